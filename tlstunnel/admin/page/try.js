// The try-it page: opens a WebSocket through the tunnel, sends, and shows what comes back and how long that took.
// It has a content security policy of its own, which lets it connect to any wss:// address, and to nothing else.

import { facts, field, h, setText } from "./dom.js";
import { count, figure } from "./format.js";

const MOST_LINES = 200;
const PINGS = 20;

const address = h("input", { name: "address", type: "url", required: true, placeholder: "wss://chat.example/", autocomplete: "off", spellcheck: "false" });
const protocols = h("input", { name: "protocols", autocomplete: "off", placeholder: "none", spellcheck: "false" });
const connect = h("button", { type: "submit", class: "primary", text: "Connect" });
const disconnect = h("button", { type: "button", disabled: true, click: () => socket?.close(1000, "done"), text: "Disconnect" });
const message = h("input", { name: "message", autocomplete: "off", value: "hello" });
const send = h("button", { type: "submit", disabled: true, text: "Send" });
const series = h("button", { type: "button", disabled: true, click: sendSeries, text: `Send ${PINGS}` });
const state = h("p", { role: "status", class: "lead", text: "Not connected." });
const help = h("div", { class: "help", hidden: true });
const figures = h("div");
const conversation = h("ol", { class: "conversation", tabindex: "0", "aria-label": "Conversation" });
const empty = h("p", { class: "empty", text: "Connect, then send a message. An origin that echoes sends it back." });

let socket = null;
let waiting = []; // when each message that has no echo yet was sent
let times = []; // of round trips, in milliseconds

document.querySelector("main").append(
  h("form", { class: "filters", submit: open }, wide(field("Address", address)), field("Subprotocols", protocols), connect, disconnect),
  state, help,
  h("form", { class: "filters", submit: (event) => (event.preventDefault(), sendOne(message.value)) }, wide(field("Message", message)), send, series),
  figures, empty, conversation,
);
conversation.hidden = true;
suggest();

function wide(label) {
  label.classList.add("address");
  return label;
}

/** Fills in the first address that the tunnel listens on, with the name of a site. The page that embeds this one says
 * them in the fragment. */
function suggest() {
  const asked = decodeURIComponent(location.hash.slice(1));
  if (/^wss:\/\//.test(asked)) address.value = asked;
}
addEventListener("hashchange", () => {
  if (socket === null) suggest();
});

function open(event) {
  event.preventDefault();
  let url;
  try {
    url = new URL(address.value);
  } catch {
    return setText(state, "This is not an address. An address looks like wss://chat.example/path.");
  }
  if (url.protocol !== "wss:") return setText(state, "The address has to begin with wss://: the tunnel accepts only TLS.");
  help.hidden = true;
  waiting = [];
  times = [];
  showFigures();
  const began = performance.now();
  const offered = protocols.value.split(/[\s,]+/).filter(Boolean);
  try {
    socket = new WebSocket(url, offered);
  } catch (error) {
    return setText(state, `The browser refuses it: ${error.message}`);
  }
  socket.binaryType = "arraybuffer";
  let opened = false;
  setText(state, "Connecting …");
  enable(false, true);
  socket.addEventListener("open", () => {
    opened = true;
    setText(state, `Connected in ${figure(performance.now() - began)} ms${socket.protocol ? `, subprotocol ${socket.protocol}` : ""}.`);
    enable(true, true);
    message.focus();
  });
  socket.addEventListener("message", ({ data }) => {
    const sent = waiting.shift();
    const took = sent === undefined ? null : performance.now() - sent;
    if (took !== null) times.push(took);
    add("received", typeof data === "string" ? data : `${count(data.byteLength)} bytes`, took);
    showFigures();
  });
  socket.addEventListener("close", (closed) => {
    socket = null;
    enable(false, false);
    if (opened) return setText(state, `Closed with ${closed.code}${closed.reason ? `: ${closed.reason}` : ""}${closed.wasClean ? "." : ", without a closing handshake."}`);
    setText(state, `No connection after ${figure(performance.now() - began)} ms. The browser gives no reason.`);
    explain(url);
  });
}

function enable(conversing, connected) {
  send.disabled = series.disabled = !conversing;
  disconnect.disabled = !connected;
  connect.disabled = connected;
}

function sendOne(text) {
  if (socket?.readyState !== WebSocket.OPEN) return;
  waiting.push(performance.now());
  socket.send(text);
  add("sent", text, null);
}

async function sendSeries() {
  series.disabled = true;
  for (let index = 1; index <= PINGS && socket !== null; index += 1) {
    sendOne(`${message.value} ${index}`);
    const began = performance.now();
    while (waiting.length && socket !== null && performance.now() - began < 2000) await new Promise((resolve) => setTimeout(resolve, 2));
  }
  series.disabled = socket === null;
}

function add(direction, text, took) {
  empty.hidden = true;
  conversation.hidden = false;
  const now = new Date().toLocaleTimeString("en-GB");
  const cut = text.length > 500 ? `${text.slice(0, 500)} …` : text;
  conversation.append(h("li", {}, h("span", { class: "note number", text: now }), h("span", { class: "note", text: direction }), h("span", { text: cut }), h("span", { class: "number", text: took === null ? "" : `${figure(took)} ms` })));
  while (conversation.childElementCount > MOST_LINES) conversation.firstElementChild.remove();
  conversation.scrollTop = conversation.scrollHeight;
}

function showFigures() {
  if (times.length === 0) return figures.replaceChildren();
  const sorted = [...times].sort((one, other) => one - other);
  const at = (share) => `${figure(sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))])} ms`;
  figures.replaceChildren(facts([["Round trips", count(times.length)], ["Median", at(0.5)], ["Fastest", at(0)], ["Slowest", `${figure(sorted.at(-1))} ms`]]));
}

/** A page is told nothing about why a WebSocket fails, so this says how to find out. */
function explain(url) {
  const page = `https://${url.host}/`;
  help.replaceChildren(
    h("p", { text: "Browsers do not tell a page why a WebSocket failed. The usual causes, the most likely first:" }),
    h("ol", {},
      h("li", {}, "The browser does not trust the certificate. Open ", h("a", { href: page, target: "_blank", rel: "noreferrer", text: page }), " in a tab: if it warns, import the authority (certs/ca.pem for a test certificate), or use a certificate that browsers trust. Accepting the warning for that page may be enough for a test."),
      h("li", {}, "The name has no address, or the port is closed. Check with: ", h("code", { text: `tlstunnel check ${url.href}` }), ", which shows the step that fails."),
      h("li", {}, "The tunnel refused the handshake: it is then among the refusals (Handshakes), with what every stage decided. This page's web origin is ", h("code", { text: location.origin }), "; a site that checks web origins has to allow it."),
      h("li", {}, "The origin is down: see Origins."),
    ),
  );
  help.hidden = false;
}
