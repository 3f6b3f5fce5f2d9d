// The origins and their health.

import { Poll, get } from "./api.js";
import { show } from "./dialogs.js";
import { badge, facts, field, filterForm, h, panel, setText } from "./dom.js";
import { ago, count, counted, duration, moment } from "./format.js";
import { Table } from "./table.js";

const PAGE = 100;
const STATES = { healthy: ["good", "healthy"], ejected: ["bad", "not used for now"], trial: ["warn", "tried again"], down: ["bad", "down"], unresolved: ["info", "no address yet"] };

export function originsView() {
  let offset = 0;
  let now = 0;
  const site = h("input", { type: "search", name: "site", autocomplete: "off" });
  const unhealthy = h("input", { type: "checkbox", name: "unhealthy" });
  const total = h("span", { class: "note" });
  const place = h("span", { class: "note" });
  const back = h("button", { type: "button", click: () => turn(-PAGE), text: "Previous" });
  const next = h("button", { type: "button", click: () => turn(PAGE), text: "Next" });
  const table = new Table({
    caption: "Origins",
    key: (origin) => `${origin.site} ${origin.route} ${origin.address}`,
    onOpen: open,
    columns: [
      { title: "Origin", wide: true, text: (origin) => origin.address },
      { title: "State", node: (origin) => stateOf(origin, now) },
      { title: "Site", wide: true, text: (origin) => `${origin.site}${origin.route ? ` ${origin.route}` : ""}` },
      { title: "Tunnels", number: true, text: (origin) => (origin.max_tunnels ? `${count(origin.tunnels)} of ${count(origin.max_tunnels)}` : count(origin.tunnels)) },
      { title: "Connects", number: true, hide: true, text: (origin) => count(origin.connects) },
      { title: "Failures", number: true, hide: true, text: (origin) => count(origin.failures) },
      { title: "Last problem", wide: true, hide: true, text: (origin) => (origin.problem ? `${origin.problem}${origin.problem_at ? ` (${ago(origin.problem_at, now)})` : ""}` : "none") },
    ],
  });
  const poll = new Poll(
    2,
    () => get("/api/v1/origins", { site: site.value.trim(), unhealthy: unhealthy.checked ? "true" : "", limit: PAGE, offset }),
    (result) => {
      now = result.now;
      setText(total, `${counted(result.total, "origin")}${result.silent?.length ? `; ${counted(result.silent.length, "process does", "processes do")} not respond` : ""}`);
      table.update(result.origins, unhealthy.checked ? "All origins are healthy." : "No origin matches.");
      setText(place, result.origins.length ? `${count(offset + 1)} to ${count(offset + result.origins.length)} of ${count(result.total)}` : "");
      back.disabled = offset === 0;
      next.disabled = offset + result.origins.length >= result.total;
    },
    (error) => table.update([], error.message),
  );
  const restart = () => {
    offset = 0;
    poll.now();
  };

  function turn(step) {
    offset = Math.max(0, offset + step);
    poll.now();
  }

  function open(origin) {
    show(
      `Origin ${origin.address}`,
      h("p", { class: "lead" }, stateOf(origin, now)),
      facts([
        ["Site", origin.site], ["Route", origin.route], ["Backup", origin.backup ? "yes: used only while no other can be" : ""], ["Weight", count(origin.weight)],
        ["Open tunnels", count(origin.tunnels)], ["Most tunnels", origin.max_tunnels ? count(origin.max_tunnels) : ""], ["Connects", count(origin.connects)],
        ["Failures", count(origin.failures)], ["Last connected", origin.connected_at ? moment(origin.connected_at) : ""], ["Health check", origin.checked ? "yes" : ""], ["Last problem", origin.problem], ["At", origin.problem_at ? moment(origin.problem_at) : ""],
        ["Tried again at", origin.until ? moment(origin.until) : ""], ["Addresses", (origin.resolved ?? []).join(", ")],
      ]),
    );
  }

  const element = h(
    "div",
    { class: "view" },
    h("h1", { class: "unseen", text: "Origins" }),
    panel("Origins", total, filterForm("Filter origins", restart, field("Site", site), h("label", { class: "check" }, unhealthy, "Only those with problems")), table.element, h("div", { class: "pages" }, back, place, next)),
  );
  return { element, show: () => poll.start(), hide: () => poll.stop(), takeOverview: () => {} };
}

function stateOf(origin, now) {
  const [usual, words] = STATES[origin.state] ?? ["info", origin.state];
  const level = origin.state === "unresolved" && origin.problem ? "bad" : usual;
  const more = origin.state === "ejected" && origin.until ? `, for ${duration(origin.until - now)}` : "";
  return badge(level, `${words}${more}${origin.backup ? ", backup" : ""}`);
}
