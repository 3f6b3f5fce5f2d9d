// The dashboard: one page with a view for each subject, which share the live figures.

import { get, keepSession, post, readSession } from "./api.js";
import { findAttention } from "./attention.js";
import { redrawAll } from "./charts.js";
import { confirm } from "./dialogs.js";
import { field, h, icon, setText } from "./dom.js";
import { count, time } from "./format.js";
import { Live } from "./live.js";
import { certificatesView } from "./certificates.js";
import { handshakesView } from "./handshakes.js";
import { originsView } from "./origins.js";
import { overviewView } from "./overview.js";
import { processesView } from "./processes.js";
import { sitesView } from "./sites.js";
import { sources } from "./sources.js";
import { tryView } from "./tryit.js";
import { tunnelsView } from "./tunnels.js";

const VIEWS = [
  ["overview", "Overview", overviewView],
  ["tunnels", "Tunnels", tunnelsView],
  ["handshakes", "Handshakes", handshakesView],
  ["sites", "Sites", sitesView],
  ["origins", "Origins", originsView],
  ["certificates", "Certificates", certificatesView],
  ["processes", "Processes", processesView],
  ["try", "Try it", tryView],
];

const main = document.querySelector("main");
const banner = document.querySelector("#banner");
const announcer = document.querySelector("#announcer");
const nav = document.querySelector("nav ul");
const links = new Map();
const views = new Map();
let shown = null;

/** What all views share. */
const app = {
  overview: null,
  live: null,
  sources: sources(),
  /** Says something to screen readers, once. */
  announce: (text) => setText(announcer, text),
  /** Asks, acts, and shows the result; first logs in if that is needed. */
  act: (question) => (mayAct() ? confirm({ ...question, onFailure: endSession }) : logIn(() => mayAct() && app.act(question))),
  attention: [],
};

app.live = new Live({ onOverview: takeOverview, onRecords: (records, leftOut) => views.get("handshakes")?.takeRecords(records, leftOut), onState: showState });

// --- views -------------------------------------------------------------------------------------------------------

for (const [name, title] of VIEWS) {
  const bubble = h("span", { class: "bubble", hidden: true });
  const link = h("a", { href: `#/${name}` }, title, bubble);
  links.set(name, { link, bubble });
  nav.append(h("li", {}, link));
}

function route() {
  const name = links.has(location.hash.slice(2)) ? location.hash.slice(2) : "overview";
  if (shown === name) return;
  views.get(shown)?.hide();
  for (const { link } of links.values()) link.removeAttribute("aria-current");
  links.get(name).link.setAttribute("aria-current", "page");
  links.get(name).link.scrollIntoView({ block: "nearest", inline: "nearest" });
  if (!views.has(name)) views.set(name, VIEWS.find(([other]) => other === name)[2](app));
  const view = views.get(name);
  const moved = shown !== null;
  shown = name;
  if (!view.element.isConnected) main.append(view.element);
  for (const [other, { element }] of views) element.hidden = other !== name;
  const title = VIEWS.find(([other]) => other === name)[1];
  document.title = name === "overview" ? "tlstunnel" : `${title} · tlstunnel`;
  view.show();
  if (app.overview) view.takeOverview(app.overview);
  if (moved) main.focus({ preventScroll: true });
  scrollTo(0, 0);
}

// --- live figures ------------------------------------------------------------------------------------------------

function takeOverview(overview) {
  app.overview = overview;
  setText(document.querySelector("#version"), `${overview.version}, generation ${overview.generation}`);
  setText(document.querySelector("#clock"), time(overview.now));
  views.get(shown)?.takeOverview(overview);
  if (shown !== "overview") views.get("overview")?.remember(overview);
  showAttention();
}

function showAttention() {
  app.attention = findAttention({ overview: app.overview, ...app.sources.latest });
  for (const [name, { bubble }] of links) {
    const urgent = app.attention.filter((line) => line.to === name && line.level !== "info").length;
    bubble.hidden = urgent === 0;
    if (bubble.dataset.number !== String(urgent)) {
      bubble.dataset.number = String(urgent);
      bubble.replaceChildren(h("span", { "aria-hidden": "true", text: count(urgent) }), h("span", { class: "unseen", text: `, ${count(urgent)} to look at` }));
    }
  }
  views.get("overview")?.showAttention();
}
app.sources.onChange = () => {
  showAttention();
  views.get(shown)?.takeSource?.();
};

function showState(state, retryIn) {
  const pill = document.querySelector("#state");
  const words = { connecting: "Connecting", live: "Live", stale: "Stale", gone: "Tunnel gone" };
  if (pill.dataset.state !== state) {
    pill.dataset.state = state;
    pill.replaceChildren(icon({ live: "good", connecting: "info", stale: "warn", gone: "bad" }[state]), words[state]);
    document.body.dataset.state = state;
    app.announce(state === "live" ? "The figures are live." : state === "gone" ? "The tunnel cannot be reached. The figures are old." : "");
    if (state === "gone") findOutWhy();
    if (state === "live") app.sources.refresh();
  }
  const since = app.overview ? ` The figures are those of ${time(app.overview.now)}.` : "";
  banner.hidden = state === "live" || state === "connecting";
  if (state === "stale") setText(banner.querySelector("p"), `Nothing has come from the tunnel for a few seconds.${since}`);
  if (state === "gone") setText(banner.querySelector("p"), `The tunnel cannot be reached.${since} ${retryIn > 0 ? `The next attempt is in ${retryIn} s.` : "Connecting …"}`);
}

// A WebSocket that fails gives no reason, so it is asked for in another way.
async function findOutWhy() {
  try {
    await get("/api/v1/session");
  } catch (error) {
    if (error.status === 401) logIn(() => app.live.connect());
  }
}

// --- the session -------------------------------------------------------------------------------------------------

const sessionButton = document.querySelector("#session");

let access = "none"; // what this browser may do: by a session, or by a client certificate

const mayAct = () => access === "full";

/** Asks what this browser may do, and forgets a session that is over. */
async function learnSession() {
  const session = readSession();
  try {
    const known = await get("/api/v1/session");
    access = known.access;
    if (session && !known.logged_in) keepSession(null);
  } catch (error) {
    if (error.status === 401) keepSession(null);
    access = "none";
  }
  setText(sessionButton, readSession() ? `Log out ${readSession().name}` : "Log in");
}

function endSession(error) {
  if (error.status === 401) learnSession();
}

function logIn(then = () => {}) {
  const token = h("input", { type: "password", name: "token", required: true, autocomplete: "current-password", spellcheck: "false" });
  confirm({
    title: "Log in",
    text: "Reading may need no token, but every action does. Tokens are in the files that the configuration names in [admin].",
    fields: [field("Token", token)],
    button: "Log in",
    run: async (values) => {
      keepSession(await post("/login", { token: values.token }));
      token.value = "";
      await learnSession();
      return mayAct() ? "You are logged in." : "You are logged in. This token may only read.";
    },
    done: () => {
      const dialog = token.closest("dialog");
      if (mayAct()) dialog.close();
      then();
    },
  });
  token.focus();
}

sessionButton.addEventListener("click", async () => {
  if (!readSession()) return logIn(() => app.live.connect());
  confirm({
    title: "Log out",
    text: "Actions then need the token again.",
    button: "Log out",
    run: async () => {
      await post("/logout").catch(() => {}); // it may be over already
      keepSession(null);
      await learnSession();
      return "You are logged out.";
    },
  });
});

// --- theme -------------------------------------------------------------------------------------------------------

const theme = document.querySelector("#theme");
theme.value = document.documentElement.dataset.theme ?? "auto";
theme.addEventListener("change", () => {
  if (theme.value === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme.value;
  try {
    localStorage.setItem("theme", theme.value);
  } catch {
    // Storage is blocked: the choice holds for this page.
  }
  redrawAll();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);

// --- start -------------------------------------------------------------------------------------------------------

banner.querySelector("button").addEventListener("click", () => app.live.connect());
addEventListener("hashchange", route);
document.addEventListener("visibilitychange", () => (document.hidden ? views.get(shown)?.hide() : views.get(shown)?.show()));
route();
learnSession();
addEventListener("storage", learnSession);
app.live.connect();
app.sources.start();
