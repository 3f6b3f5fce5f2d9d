// The processes, with their generations during an upgrade, and when the configuration was loaded.

import { get, post } from "./api.js";
import { show } from "./dialogs.js";
import { badge, facts, h, panel, setText } from "./dom.js";
import { ago, bytes, count, counted, duration, figure, moment } from "./format.js";
import { Table } from "./table.js";

const STATES = { serving: "good", counting: "good", assessing: "good", draining: "info", "not responding": "bad" };

export function processesView(app) {
  let now = 0;
  const summary = h("p", { class: "lead" });
  const problems = h("ul", { class: "attention" });
  const table = new Table({
    caption: "Serving processes",
    key: (one) => one.process,
    columns: [
      { title: "Process", text: (one) => String(one.process) },
      { title: "State", node: (one) => badge(STATES[one.state] ?? "info", one.state) },
      { title: "Generation", number: true, text: (one) => count(one.generation) },
      { title: "Version", text: (one) => one.version },
      { title: "Tunnels", number: true, text: (one) => count(one.tunnels) },
      { title: "Handshakes in progress", number: true, hide: true, text: (one) => count(one.handshakes) },
      { title: "Memory", number: true, hide: true, text: (one) => (one.pss_kib == null ? "–" : bytes(one.pss_kib * 1024)) },
      { title: "Age", number: true, text: (one) => duration(one.seconds) },
      { title: "Counts", hide: true, wide: true, text: (one) => ({ ledger: "with all others", "": "alone" })[one.counting ?? ""] ?? one.counting },
    ],
    empty: "No serving process.",
  });
  const others = new Table({
    caption: "Other processes",
    key: (one) => one.role,
    columns: [
      { title: "Process", text: (one) => one.role },
      { title: "State", node: (one) => badge(STATES[one.state] ?? "info", one.state) },
      { title: "Id", number: true, text: (one) => String(one.process) },
      { title: "Version", text: (one) => one.version },
      { title: "Memory", number: true, hide: true, text: (one) => (one.pss_kib == null ? "–" : bytes(one.pss_kib * 1024)) },
      { title: "More", wrap: true, hide: true, text: (one) => one.more },
    ],
    empty: "There is no ledger and no other process.",
  });
  const loads = new Table({
    caption: "Loads of the configuration",
    key: (load) => `${load.at} ${load.what}`,
    onOpen: openLoad,
    columns: [
      { title: "When", text: (load) => moment(load.at) },
      { title: "What", text: (load) => load.what },
      { title: "Result", node: resultOf },
      { title: "Generation", number: true, hide: true, text: (load) => count(load.generation) },
      { title: "Version", hide: true, text: (load) => load.version },
      { title: "Who", hide: true, text: (load) => load.who || "–" },
    ],
    empty: "No load is known.",
  });

  const element = h(
    "div",
    { class: "view" },
    h("h1", { class: "unseen", text: "Processes" }),
    panel("Processes", h("div", { class: "buttons" },
      h("button", { type: "button", click: reload, text: "Reload …" }),
      h("button", { type: "button", class: "dangerous", click: drain, text: "Drain …" })), summary, problems, table.element),
    h("div", { class: "columns" }, panel("Other processes", null, others.element), panel("Configuration", h("button", { type: "button", class: "quiet", click: openConfiguration, text: "Show the configuration" }), loads.element)),
  );

  function openLoad(load) {
    const list = (lines) => h("ul", { class: "lines" }, ...lines.map((line) => h("li", { text: line })));
    show(
      `${load.what[0].toUpperCase()}${load.what.slice(1)} of ${moment(load.at)}`,
      facts([["File", load.file], ["Generation", count(load.generation)], ["Version", load.version], ["Who", load.who]]),
      load.problems?.length ? h("h3", { text: "Problems" }) : null,
      load.problems?.length ? list(load.problems) : null,
      h("h3", { text: "Changes" }),
      load.changes?.length ? list(load.changes) : h("p", { text: "Nothing has changed." }),
    );
  }

  async function openConfiguration() {
    const text = h("pre", { text: "Loading …", tabindex: "0" });
    show("Configuration", h("p", { class: "note", text: "What is served, with every default. Secrets are hidden." }), text);
    try {
      const result = await get("/api/v1/configuration");
      text.textContent = JSON.stringify(result.configuration, null, 2);
      text.before(facts([["File", result.file || "none"], ["Folder", result.folder], ["Loaded", moment(result.loaded)]]));
    } catch (error) {
      text.textContent = error.message;
    }
  }

  function reload() {
    app.act({
      title: "Reload",
      text: "The configuration, the certificates and the lists are read again. No client is disconnected, and a wrong file changes nothing.",
      button: "Reload",
      run: async () => {
        const { changes } = await post("/api/v1/reload");
        return changes.length ? changes : ["Nothing has changed."];
      },
      done: () => app.sources.refresh("loads"),
    });
  }

  function drain() {
    app.act({
      title: "Drain the tunnel",
      text: `All ${counted(app.overview?.tunnels, "tunnel")} end over the time that [release] sets, nothing new is accepted, and then the program exits. This page ends with it. It cannot be undone.`,
      button: "Drain and exit",
      dangerous: true,
      run: async () => {
        await post("/api/v1/drain");
        return "The tunnel drains, and then exits.";
      },
    });
  }

  function drawLoads() {
    loads.update(app.sources.latest.loads?.loads ?? [], app.sources.errors.loads);
  }

  return {
    element,
    show: drawLoads,
    hide: () => {},
    takeSource: drawLoads,
    takeOverview(overview) {
      now = overview.now;
      const processes = [...(overview.processes ?? [])].sort((one, other) => other.generation - one.generation || one.place - other.place);
      table.update(processes);
      const generations = new Set(processes.map((one) => one.generation));
      const versions = [...new Set(processes.map((one) => one.version))];
      setText(summary, generations.size > 1
        ? `Generation ${overview.generation} (${overview.version}) serves new connections; ${counted(generations.size - 1, "earlier generation keeps its", "earlier generations keep their")} tunnels until these end. Versions: ${versions.join(", ")}.`
        : `Generation ${overview.generation} of version ${overview.version}.`);
      const relevant = app.attention.filter((line) => line.to === "processes" && line.level !== "info");
      const text = JSON.stringify(relevant);
      if (problems.dataset.text !== text) {
        problems.dataset.text = text;
        problems.replaceChildren(...relevant.map((line) => h("li", { class: line.level }, badge(line.level, line.level === "bad" ? "Problem" : "Warning"), h("span", { text: line.text }))));
      }
      others.update([overview.ledger && { ...overview.ledger, role: "ledger", more: describeLedger(overview.ledger, now) }, overview.admin && { ...overview.admin, role: "admin", more: "this page, plans and notices" }].filter(Boolean));
    },
  };
}

function resultOf(load) {
  if (load.problems?.length) return badge("bad", "failed, nothing changed");
  if (load.what === "start") return badge("good", "loaded");
  return badge("good", load.changes?.length ? counted(load.changes.length, "change") : "no change");
}

function describeLedger(ledger, now) {
  const parts = [];
  if (ledger.answering) parts.push(`counts in ${ledger.answering}`);
  if (ledger.questions_per_second != null) parts.push(`${figure(ledger.questions_per_second)} questions/s`);
  if (ledger.keys != null) parts.push(counted(ledger.keys, "key"));
  if (ledger.history) parts.push(ledger.history.problem ? `history: ${ledger.history.problem}` : `history of ${bytes(ledger.history.bytes)}${ledger.history.last ? `, last minute ${ago(ledger.history.last, now)}` : ""}`);
  return parts.join(", ");
}
