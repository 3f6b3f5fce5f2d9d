// The open tunnels: a page of the list at a time, sorted and filtered by the tunnel.

import { Poll, get, post, remove } from "./api.js";
import { show } from "./dialogs.js";
import { facts, field, filterForm, h, panel, setText } from "./dom.js";
import { bytes, bytesPerSecond, count, counted, duration, moment } from "./format.js";
import { Table } from "./table.js";

const PAGE = 50;
const SORTS = { age: "descending", rate: "descending", up: "descending", down: "descending", site: "ascending", client: "ascending", origin: "ascending" };
const AGES = [["0", "any"], ["60", "1 min"], ["3600", "1 h"], ["86400", "1 day"]];

export function tunnelsView(app) {
  let sort = "age";
  const cursors = [""]; // what continues the list, a page each
  const filters = {
    site: h("input", { type: "search", name: "site", autocomplete: "off" }),
    client: h("input", { type: "search", name: "client", autocomplete: "off", placeholder: "address or network" }),
    origin: h("input", { type: "search", name: "origin", autocomplete: "off" }),
    tag: h("input", { type: "search", name: "tag", autocomplete: "off", placeholder: "name=value" }),
    older: h("select", { name: "older" }, ...AGES.map(([value, text]) => h("option", { value, text }))),
  };
  const total = h("span", { class: "note" });
  const problem = h("p", { class: "problem", hidden: true });
  const place = h("span", { class: "note" });
  const back = h("button", { type: "button", click: () => turn(-1), text: "Previous" });
  const next = h("button", { type: "button", click: () => turn(1), text: "Next" });
  let following = "";

  const table = new Table({
    caption: "Open tunnels",
    key: (tunnel) => `${tunnel.process} ${tunnel.id}`,
    onOpen: (tunnel) => open(tunnel),
    onSort: (name) => {
      sort = name;
      restart();
    },
    columns: [
      { title: "Client", sort: "client", text: (tunnel) => tunnel.client || "(Unix socket)" },
      { title: "Site", sort: "site", wide: true, text: (tunnel) => tunnel.site },
      { title: "Path", wide: true, hide: true, text: (tunnel) => tunnel.path },
      { title: "Origin", sort: "origin", wide: true, hide: true, text: (tunnel) => tunnel.origin },
      { title: "Age", sort: "age", number: true, text: (tunnel) => duration(tunnel.seconds) },
      { title: "Rate", sort: "rate", number: true, text: (tunnel) => bytesPerSecond(tunnel.rate) },
      { title: "Up", sort: "up", number: true, hide: true, text: (tunnel) => bytes(tunnel.up) },
      { title: "Down", sort: "down", number: true, hide: true, text: (tunnel) => bytes(tunnel.down) },
      { title: "State", hide: true, text: (tunnel) => (tunnel.draining ? "draining" : "open") },
    ],
  });

  const poll = new Poll(2, ask, take, (error) => {
    problem.hidden = false;
    setText(problem, error.message);
  });

  const form = filterForm(
    "Filter tunnels",
    restart,
    field("Site", filters.site), field("Client", filters.client), field("Origin", filters.origin), field("Tag", filters.tag), field("Older than", filters.older),
    h("button", { type: "reset", click: () => setTimeout(restart), text: "Clear" }),
    h("button", { type: "button", class: "dangerous", click: () => endMatching(), text: "End these …" }),
  );

  const element = h(
    "div",
    { class: "view" },
    h("h1", { class: "unseen", text: "Tunnels" }),
    panel("Open tunnels", total, form, problem, table.element, h("div", { class: "pages" }, back, place, next)),
  );

  function chosen() {
    return Object.fromEntries(Object.entries(filters).map(([name, control]) => [name, name === "older" ? Number(control.value) : control.value.trim()]));
  }

  const isFiltered = () => Object.values(chosen()).some(Boolean);

  function ask() {
    return get("/api/v1/tunnels", { ...chosen(), sort, limit: PAGE, after: cursors.at(-1) });
  }

  function take(result) {
    problem.hidden = result.silent?.length ? false : true;
    setText(problem, result.silent?.length ? `${counted(result.silent.length, "process does", "processes do")} not respond: the tunnels there are missing.` : "");
    setText(total, `${counted(result.total, "tunnel")}${isFiltered() ? " match" : ""}`);
    table.update(result.tunnels, isFiltered() ? "No open tunnel matches." : "No tunnel is open. Connect a client, or use “Try it”.");
    table.markSorted(sort, SORTS[sort]);
    following = result.next ?? "";
    const first = (cursors.length - 1) * PAGE;
    setText(place, result.tunnels.length ? `${count(first + 1)} to ${count(first + result.tunnels.length)} of ${count(result.total)}` : "");
    back.disabled = cursors.length === 1;
    next.disabled = following === "";
    if (result.tunnels.length === 0 && cursors.length > 1) restart();
  }

  function turn(step) {
    if (step > 0 && following) cursors.push(following);
    if (step < 0 && cursors.length > 1) cursors.pop();
    poll.now();
    table.frame.scrollTop = 0;
  }

  function restart() {
    cursors.splice(1);
    poll.now();
  }

  function open(tunnel) {
    const tags = Object.entries(tunnel.tags ?? {}).map(([name, value]) => `${name}=${value}`).join(", ");
    const dialog = show(
      "Tunnel",
      facts([
        ["Id", h("code", { text: tunnel.id })], ["Client", tunnel.client], ["Peer", tunnel.peer === tunnel.client ? "" : tunnel.peer], ["Client certificate", tunnel.client_subject],
        ["Site", tunnel.site], ["Server name in TLS", tunnel.sni], ["Path", tunnel.path], ["Origin", tunnel.origin],
        ["Web origin", tunnel.web_origin], ["User agent", tunnel.user_agent], ["Opened", `${moment(tunnel.opened)} (${duration(tunnel.seconds)} ago)`],
        ["Up, from the client", bytes(tunnel.up)], ["Down, to the client", bytes(tunnel.down)], ["Rate", bytesPerSecond(tunnel.rate)],
        ["TLS", [tunnel.tls_version, tunnel.cipher].filter(Boolean).join(", ")], ["JA4", tunnel.ja4 ? h("code", { text: tunnel.ja4 }) : ""],
        ["Edge worker", tunnel.edge], ["Tags", tags], ["Ends at", tunnel.until ? moment(tunnel.until) : ""], ["Process", String(tunnel.process)],
      ]),
      h("div", { class: "buttons" }, h("button", { type: "button", class: "dangerous", click: () => (dialog.close(), endOne(tunnel)), text: "End this tunnel …" })),
    );
  }

  function endOne(tunnel) {
    app.act({
      title: "End a tunnel",
      text: `The tunnel of ${tunnel.client || "a client"} to ${tunnel.site} (${tunnel.path || "/"}) ends at once. Its client may connect again.`,
      button: "End the tunnel",
      dangerous: true,
      run: async () => describeEnded(await remove(`/api/v1/tunnels/${encodeURIComponent(tunnel.id)}`)),
      done: () => poll.now(),
    });
  }

  function endMatching() {
    const fields = chosen();
    const words = Object.entries(fields).filter(([, value]) => value).map(([name, value]) => (name === "older" ? `older than ${duration(value)}` : `${name} ${value}`));
    if (words.length === 0) return show("End tunnels", h("p", { text: "Set at least one filter, such as a site or a client: all tunnels that match it can then be ended. To end all tunnels, drain the tunnel (Processes)." }));
    app.act({
      title: "End tunnels",
      text: `All tunnels that match end at once: ${words.join(", ")}. That is ${total.textContent} now, on all pages of the list. Their clients may connect again.`,
      fields: [field("Why", h("input", { name: "why", autocomplete: "off" }), "It is written to the record of each.")],
      button: "End these tunnels",
      dangerous: true,
      run: async ({ why }) => describeEnded(await post("/api/v1/tunnels/end", { ...fields, why, confirm: true })),
      done: () => poll.now(),
    });
  }

  return { element, show: () => poll.start(), hide: () => poll.stop(), takeOverview: () => {} };
}

function describeEnded(result) {
  const lines = [`${counted(result.number, "tunnel is", "tunnels are")} being ended.`];
  if (result.announced) lines.push("Other machines have been told.");
  if (result.problem) lines.push(`Other machines: ${result.problem}.`);
  if (result.silent?.length) lines.push(`${counted(result.silent.length, "process does", "processes do")} not respond: the tunnels there go on.`);
  return lines;
}
