// The first view: what needs attention, the figures of this second, and how they came about.

import { ApiError, get } from "./api.js";
import { Chart } from "./charts.js";
import { badge, h, icon, panel, setText } from "./dom.js";
import { bytes, bytesPerSecond, count, counted, duration, figure, latency, percent, perSecond } from "./format.js";
import { Table } from "./table.js";
import { topClients } from "./clients.js";

const WINDOW = 300; // seconds of live figures
const LEAST_WINDOW = 60;
const SMOOTHED = 5; // seconds that the rates in the tiles are the means of
const RANGES = [["live", "5 min"], ["24h", "24 h"], ["7d", "7 days"], ["30d", "30 days"]];
const SPANS = { "24h": 86_400, "7d": 7 * 86_400, "30d": 30 * 86_400 };
const LEVELS = { bad: "Problem", warn: "Warning", info: "Note" };
/** The stages in their order, in words. The checks of the firewall, such as "firewall: rules", come after it. */
const STAGES = {
  "proxy header": "PROXY header", hello: "ClientHello", tls: "TLS handshake", request: "Upgrade request", firewall: "Firewall", edge: "Edge worker",
  "origin connect": "Connecting to the origin", "origin response": "Response of the origin", total: "Whole handshake",
};
const PLACES = Object.keys(STAGES);

export function overviewView(app) {
  const samples = [];
  let range = "live";
  let past = null;
  let timer = 0;

  // What needs attention.
  const attention = h("ul", { class: "attention" });
  let attended = "";

  // Tiles.
  const tiles = {
    tunnels: tile("Open tunnels"), opened: tile("Handshakes"), refused: tile("Refused"),
    traffic: tile("Traffic"), latency: tile("Whole handshake, p99"), machine: tile("Processes"),
  };

  // Charts.
  const charts = {
    tunnels: new Chart({ title: "Open tunnels", series: [{ label: "Tunnels" }, { label: "Mean", dashed: true }], format: count, summarise: sumUp(count) }),
    handshakes: new Chart({ title: "Handshakes", note: "per second", series: [{ label: "Opened" }, { label: "Refused" }], format: figure, summarise: sumUp(perSecond) }),
    traffic: new Chart({ title: "Traffic", note: "per second", series: [{ label: "Up" }, { label: "Down" }], format: bytes, summarise: sumUp(bytesPerSecond) }),
    latency: new Chart({ title: "Latency of handshakes", series: [{ label: "p50" }, { label: "p90" }, { label: "p99" }], format: latency, summarise: sumUp(latency), empty: "No handshake in the last minute, or since the figures were first watched." }),
  };
  const buttons = RANGES.map(([name, label]) => h("button", { type: "button", "aria-pressed": name === range, click: () => choose(name), text: label }));
  const rangeNote = h("span", { class: "note" });

  // Tables.
  const stages = new Table({
    caption: "Latency by stage, over the last minute",
    key: (row) => row.stage,
    columns: [
      { title: "Stage", text: (row) => STAGES[row.stage] ?? row.stage.replace(": ", ", ") },
      { title: "p50", number: true, text: (row) => latency(row.p50) },
      { title: "p90", number: true, text: (row) => latency(row.p90) },
      { title: "p99", number: true, text: (row) => latency(row.p99) },
      { title: "Number", number: true, hide: true, text: (row) => count(row.count) },
    ],
    empty: "No handshake in the last minute, or since the figures were first watched.",
  });
  const reasons = new Table({
    caption: "Refusals by reason",
    key: (row) => row.reason,
    columns: [
      { title: "Reason", text: (row) => row.reason },
      { title: "Now", number: true, text: (row) => perSecond(row.per_second) },
      { title: "Since the start", number: true, text: (row) => count(row.total) },
    ],
    empty: "Nothing was refused since the start.",
  });
  const clients = topClients();

  const element = h(
    "div",
    { class: "view" },
    h("h1", { class: "unseen", text: "Overview" }),
    panel("Attention", null, attention),
    h("section", { class: "tiles", "aria-label": "Figures of this second" }, ...Object.values(tiles).map((one) => one.element)),
    panel("Over time", h("div", { class: "ranges", role: "group", "aria-label": "Time shown" }, rangeNote, ...buttons), h("div", { class: "charts" }, ...Object.values(charts).map((chart) => chart.element))),
    h("div", { class: "columns" }, panel("Latency by stage", h("span", { class: "note", text: "last minute" }), stages.element), panel("Refusals by reason", h("a", { href: "#/handshakes", text: "All refusals" }), reasons.element)),
    h("div", { class: "columns" }, clients.clientsPanel, clients.rulesPanel),
  );

  function tile(label) {
    const value = h("div", { class: "value" });
    const more = h("div", { class: "more" });
    return { value, more, element: h("div", { class: "tile" }, h("h2", { text: label }), value, more) };
  }

  function showTiles(now) {
    const totals = now.totals ?? {};
    const latest = samples.slice(-SMOOTHED);
    const mean = (name) => latest.reduce((sum, one) => sum + (one[name] ?? 0), 0) / latest.length;
    setText(tiles.tunnels.value, count(now.tunnels));
    setText(tiles.tunnels.more, `${counted(now.unfinished, "handshake")} in progress`);
    setText(tiles.opened.value, perSecond(mean("handshakes_per_second")));
    setText(tiles.opened.more, `${count(totals.opened)} opened since the start`);
    setText(tiles.refused.value, perSecond(mean("refused_per_second")));
    setText(tiles.refused.more, `${count(totals.refused)} since the start`);
    setText(tiles.traffic.value, bytesPerSecond(mean("up_per_second") + mean("down_per_second")));
    setText(tiles.traffic.more, `${bytes(totals.up)} up, ${bytes(totals.down)} down since the start`);
    const whole = now.latency?.total;
    setText(tiles.latency.value, whole?.count ? latency(whole.p99) : "–");
    setText(tiles.latency.more, whole?.count ? `p50 ${latency(whole.p50)}, over the last minute` : "no handshake in the last minute");
    const processes = now.processes ?? [];
    const serving = processes.filter((process) => process.state === "serving").length;
    setText(tiles.machine.value, `${count(serving)} serving`);
    setText(tiles.machine.more, describeMachine(now, processes.length - serving));
  }

  function showTables(now) {
    const rows = Object.entries(now.latency ?? {}).map(([stage, values]) => ({ stage, ...values }));
    stages.update(rows.filter((row) => row.count).sort((one, other) => placeOf(one.stage) - placeOf(other.stage)));
    reasons.update([...(now.refused ?? [])].sort((one, other) => other.per_second - one.per_second || other.total - one.total).slice(0, 8));
  }

  function remember(now) {
    const last = samples.at(-1);
    if (last && now.now <= last.now) samples.length = 0; // the clock was set back
    samples.push(now);
    while (samples.length && samples[0].now < now.now - WINDOW) samples.shift();
  }

  function drawCharts() {
    const latest = samples.at(-1);
    if (!latest) return;
    const times = samples.map((one) => one.now);
    const span = [Math.max(latest.now - WINDOW, Math.min(samples[0].now, latest.now - LEAST_WINDOW)), latest.now];
    const of = (pick) => samples.map((one) => pick(one) ?? null);
    charts.latency.update([times, ...["p50", "p90", "p99"].map((name) => of((one) => (one.latency?.total?.count ? one.latency.total[name] : null)))], span);
    if (range !== "live") return;
    charts.tunnels.update([times, of((one) => one.tunnels), times.map(() => null)], span);
    charts.handshakes.update([times, of((one) => one.handshakes_per_second), of((one) => one.refused_per_second)], span);
    charts.traffic.update([times, of((one) => one.up_per_second), of((one) => one.down_per_second)], span);
  }

  function drawPast() {
    if (!past) return;
    const { times, span } = past;
    charts.tunnels.update([times, past.peak, past.mean], span);
    charts.handshakes.update([times, past.opened, past.refused], span);
    charts.traffic.update([times, past.up, past.down], span);
  }

  async function loadPast() {
    clearTimeout(timer);
    const asked = range;
    if (asked === "live") return;
    try {
      past = toSeries(await get("/api/v1/history", { since: asked, points: 300 }));
      setText(rangeNote, "");
      if (asked === range) drawPast();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setText(rangeNote, error.message);
    }
    if (asked === range) timer = setTimeout(loadPast, 60_000);
  }

  function choose(name) {
    range = name;
    RANGES.forEach(([other], index) => buttons[index].setAttribute("aria-pressed", String(other === name)));
    charts.tunnels.annotate(name === "live" ? "" : "the most at once, and the mean");
    charts.latency.annotate(name === "live" ? "over the last minute" : "last 5 minutes: the history keeps none");
    setText(rangeNote, "");
    if (name === "live") drawCharts();
    else loadPast();
  }
  choose(range);

  function showAttention() {
    const lines = app.attention;
    const text = JSON.stringify(lines);
    if (text === attended) return;
    attended = text;
    if (lines.length === 0) {
      attention.replaceChildren(h("li", { class: "calm" }, icon("good"), h("span", { text: app.overview ? "Nothing needs attention." : "Waiting for the first figures." })));
      return;
    }
    attention.replaceChildren(
      ...lines.slice(0, 12).map((line) => h("li", { class: line.level }, badge(line.level, LEVELS[line.level]), h("span", { text: line.text }), h("a", { href: `#/${line.to}`, "aria-label": `Show ${line.to}`, text: "Show" }))),
    );
  }
  showAttention();

  return {
    element,
    remember,
    showAttention,
    show() {
      clients.show();
      if (range !== "live") loadPast();
    },
    hide() {
      clients.hide();
      clearTimeout(timer);
    },
    takeOverview(now) {
      if (samples.at(-1) !== now) remember(now);
      showTiles(now);
      showTables(now);
      drawCharts();
    },
  };
}

const placeOf = (stage) => PLACES.indexOf(stage.split(":")[0]);

function describeMachine(now, others) {
  const parts = [];
  if (others > 0) parts.push(`${count(others)} draining`);
  if (typeof now.memory === "number") parts.push(bytes(now.memory));
  if (typeof now.descriptors === "number") parts.push(`${percent(now.descriptors)} of descriptors`);
  if (now.event_loop_lag) parts.push(`lag ${latency(now.event_loop_lag.p99)}`);
  return parts.join(", ");
}

/** Returns a function that sums a chart up: the latest, the least and the most of each series. */
function sumUp(format) {
  return ([times, ...all], series) => {
    const parts = [];
    all.forEach((values, index) => {
      const known = values.filter((value) => value !== null);
      if (!known.length) return;
      const least = known.reduce((one, other) => Math.min(one, other));
      const most = known.reduce((one, other) => Math.max(one, other));
      parts.push(`${series[index].label} ${format(known.at(-1))}, ${format(least)} to ${format(most)}`);
    });
    return `${parts.join("; ")}, over ${duration(times.at(-1) - times[0])}.`;
  };
}

/** Turns the history into series. What has no samples is a gap, and is not drawn. */
export function toSeries(history) {
  const of = (pick) => history.points.map((point) => pick(point) ?? null);
  const rate = (value) => (value == null ? null : value / history.seconds);
  return {
    times: history.points.map((point) => point.time),
    span: [history.now - SPANS[history.since], history.now],
    peak: of((point) => point.peak),
    mean: of((point) => point.tunnels),
    opened: of((point) => rate(point.handshakes)),
    refused: of((point) => point.refused && rate(sumOf(point.refused))),
    up: of((point) => rate(point.up)),
    down: of((point) => rate(point.down)),
  };
}

const sumOf = (numbers) => Object.values(numbers).reduce((sum, value) => sum + value, 0);
