// Refused handshakes, with what every stage decided, and the records of connections as they end.

import { Poll, get } from "./api.js";
import { show } from "./dialogs.js";
import { badge, facts, field, filterForm, h, panel, setText } from "./dom.js";
import { bytes, count, counted, duration, moment, perSecond, time } from "./format.js";
import { Table } from "./table.js";

const MOST_RECORDS = 200;
const DECISIONS = { passed: "good", logged: "warn", refused: "bad", ended: "warn", "not configured": "none", "not reached": "none" };

export function handshakesView(app) {
  // Recent refusals.
  const filters = {
    site: h("input", { type: "search", name: "site", autocomplete: "off" }),
    reason: h("input", { type: "search", name: "reason", autocomplete: "off", placeholder: "such as rate limit" }),
    client: h("input", { type: "search", name: "client", autocomplete: "off" }),
  };
  const note = h("span", { class: "note" });
  const refusals = new Table({
    caption: "Recent refusals",
    tall: true,
    key: (refusal) => `${refusal.process} ${refusal.id} ${refusal.at}`,
    onOpen: (refusal) => openRefusal(refusal),
    columns: [
      { title: "Time", text: (refusal) => time(refusal.at) },
      { title: "Reason", wide: true, text: (refusal) => refusal.record.reason ?? "" },
      { title: "Status", number: true, text: (refusal) => (refusal.record.status ? String(refusal.record.status) : "none") },
      { title: "Client", text: (refusal) => refusal.record.client ?? "" },
      { title: "Site", wide: true, hide: true, text: (refusal) => refusal.record.site ?? "" },
      { title: "Path", wide: true, hide: true, text: (refusal) => refusal.record.path ?? "" },
    ],
  });
  const chosen = () => Object.fromEntries(Object.entries(filters).map(([name, control]) => [name, control.value.trim()]));
  const poll = new Poll(
    2,
    () => get("/api/v1/refusals", { ...chosen(), limit: 100 }),
    (result) => {
      const filtered = Object.values(chosen()).some(Boolean);
      refusals.update(result.refusals, filtered ? "No recent refusal matches." : "Nothing was refused recently.");
      setText(note, result.silent?.length ? `${counted(result.silent.length, "process does", "processes do")} not respond` : "each process keeps its last few hundred");
    },
    (error) => refusals.update([], error.message),
  );

  // Reasons.
  const reasons = new Table({
    caption: "Refusals by reason",
    key: (row) => row.reason,
    onOpen: (row) => {
      filters.reason.value = row.reason;
      poll.now();
    },
    columns: [
      { title: "Reason", text: (row) => row.reason },
      { title: "Now", number: true, text: (row) => perSecond(row.per_second) },
      { title: "Since the start", number: true, text: (row) => count(row.total) },
    ],
    empty: "Nothing was refused since the start.",
  });

  // The live tail.
  const watched = {
    site: h("input", { type: "search", name: "site", autocomplete: "off" }),
    client: h("input", { type: "search", name: "client", autocomplete: "off" }),
    verdict: h("select", { name: "verdict" }, h("option", { value: "", text: "all" }), h("option", { value: "pass", text: "passed" }), h("option", { value: "refused", text: "refused" })),
  };
  let records = [];
  let paused = false;
  let left = 0;
  let number = 0;
  let drawing = 0;
  const pause = h("button", { type: "button", "aria-pressed": "false", click: () => setPaused(!paused), text: "Pause" });
  const tailNote = h("span", { class: "note" });
  const tail = new Table({
    caption: "Connections as they end",
    tall: true,
    key: (row) => row.number,
    onOpen: (row) => openRecord(row.record),
    columns: [
      { title: "Ended", text: (row) => time(row.at) },
      { title: "Verdict", node: (row) => verdictOf(row.record) },
      { title: "Client", text: (row) => row.record.client ?? "" },
      { title: "Site", wide: true, text: (row) => row.record.site ?? "" },
      { title: "Path", wide: true, hide: true, text: (row) => row.record.path ?? "" },
      { title: "Ended by", hide: true, text: (row) => [row.record.ended_by, row.record.reason].filter(Boolean).join(": ") },
      { title: "Lasted", number: true, hide: true, text: (row) => duration(row.record.seconds) },
    ],
    empty: "No connection has ended since this view was opened.",
  });

  const element = h(
    "div",
    { class: "view" },
    h("h1", { class: "unseen", text: "Handshakes" }),
    h("div", { class: "columns uneven" },
      panel("Recent refusals", note, filterForm("Filter refusals", () => poll.now(), field("Site", filters.site), field("Reason", filters.reason), field("Client", filters.client), h("button", { type: "reset", click: () => setTimeout(() => poll.now()), text: "Clear" })), refusals.element),
      panel("By reason", null, reasons.element),
    ),
    panel("Live records", tailNote, filterForm("Filter records", watchAgain, field("Site", watched.site), field("Client", watched.client), field("Verdict", watched.verdict), pause, h("button", { type: "button", click: clear, text: "Clear" })), tail.element),
  );

  function watchAgain() {
    clear();
    app.live.watchRecords(Object.fromEntries(Object.entries(watched).map(([name, control]) => [name, control.value.trim()])));
  }

  function clear() {
    records = [];
    left = 0;
    draw();
  }

  function setPaused(value) {
    paused = value;
    pause.setAttribute("aria-pressed", String(value));
    draw();
  }

  function draw() {
    drawing = 0;
    setText(tailNote, [paused ? "paused" : "", left ? `${count(left)} left out: too many at once` : ""].filter(Boolean).join(", "));
    if (!paused) tail.update(records);
  }

  function takeRecords(found, leftOut) {
    left += leftOut;
    const at = Date.now() / 1000;
    const rows = found.map((record) => ({ number: (number += 1), at: record.timestamp ? Date.parse(record.timestamp) / 1000 : at, record }));
    records = [...rows.reverse(), ...records].slice(0, MOST_RECORDS);
    if (!drawing) drawing = setTimeout(draw, 400);
  }

  async function openRefusal(refusal) {
    const dialog = show(`Refused: ${refusal.record.reason ?? ""}`, ...describeRefusal(refusal));
    // A process may have more to say than what the list had.
    try {
      const result = await get(`/api/v1/refusals/${encodeURIComponent(refusal.id)}`);
      const full = result.refusals?.[0];
      if (full && dialog.isConnected && JSON.stringify(full) !== JSON.stringify(refusal)) {
        dialog.replaceChildren(dialog.firstElementChild, ...describeRefusal(full));
      }
    } catch {
      // What the list had is shown.
    }
  }

  async function openRecord(record) {
    if (record.verdict === "refused") {
      try {
        const result = await get(`/api/v1/refusals/${encodeURIComponent(record.id)}`);
        if (result.refusals?.[0]) return openRefusal(result.refusals[0]);
      } catch {
        // It is no longer kept: the record says what it can.
      }
    }
    show("Connection", recordFacts(record));
  }

  return {
    element,
    takeRecords,
    show() {
      poll.start();
      watchAgain();
    },
    hide() {
      poll.stop();
      app.live.watchRecords(null);
    },
    takeOverview(now) {
      reasons.update([...(now.refused ?? [])].sort((one, other) => other.total - one.total));
    },
  };
}

function verdictOf(record) {
  if (record.verdict === "refused") return badge("bad", "refused");
  if (record.verdict === "pass") return badge("good", "passed");
  return badge("info", "none");
}

function describeRefusal(refusal) {
  const stages = h("ol", { class: "stages" }, ...(refusal.stages ?? []).map((stage) => h("li", {}, badge(DECISIONS[stage.decision] ?? "none", stage.decision), h("strong", { text: stage.stage }), stage.detail && h("span", { text: stage.detail }))));
  return [
    h("p", { class: "note", text: `${moment(refusal.at)}, process ${refusal.process}` }),
    refusal.advice && h("h3", { text: "How to change that" }),
    refusal.advice && h("p", { text: refusal.advice }),
    refusal.document && h("p", { class: "note", text: `See ${refusal.document}.` }),
    h("h3", { text: "What every stage decided" }),
    refusal.stages?.length ? stages : h("p", { text: "Its stages are not known." }),
    h("h3", { text: "Its record" }),
    recordFacts(refusal.record),
  ].filter(Boolean);
}

function recordFacts(record) {
  const text = (value) => (typeof value === "object" && value !== null ? JSON.stringify(value) : String(value ?? ""));
  const render = { up: bytes, down: bytes, seconds: duration };
  return facts(Object.entries(record).map(([name, value]) => [name, (render[name] ?? text)(value)]));
}
