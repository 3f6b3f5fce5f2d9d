// The sites: each compared with its guideline, with its standing, notices and throttles.

import { ApiError, Poll, get, post } from "./api.js";
import { Chart } from "./charts.js";
import { show } from "./dialogs.js";
import { badge, facts, field, filterForm, h, panel, setText } from "./dom.js";
import { ago, bytes, count, counted, duration, figure, moment, percent, time } from "./format.js";
import { Table } from "./table.js";
import { toSeries } from "./overview.js";

const PAGE = 50;
const DIRECTIONS = { name: "ascending", tunnels: "descending", handshakes: "descending", refused: "descending", bytes: "descending" };
/** How much a standing calls for: most call for a talk at most, since a guideline is not a limit. */
const STANDINGS = { within: "good", spike: "info", repeated: "info", sustained: "info", disproportionate: "warn", "suspected abuse": "bad" };

export function sitesView(app) {
  let sort = "tunnels";
  let offset = 0;
  let assessments = new Map();
  let latest = null;
  const search = h("input", { type: "search", name: "search", autocomplete: "off" });
  const total = h("span", { class: "note" });
  const place = h("span", { class: "note" });
  const problem = h("p", { class: "problem", hidden: true });
  const back = h("button", { type: "button", click: () => turn(-PAGE), text: "Previous" });
  const next = h("button", { type: "button", click: () => turn(PAGE), text: "Next" });
  const table = new Table({
    caption: "Sites",
    key: (site) => site.names[0] ?? "",
    onOpen: (site) => open(site),
    onSort: (name) => {
      sort = name;
      restart();
    },
    columns: [
      { title: "Site", sort: "name", wide: true, text: (site) => site.shown || site.names[0] || "*" },
      { title: "Tunnels", sort: "tunnels", number: true, text: (site) => count(site.tunnels) },
      { title: "Compared with the guideline", node: (site) => comparison(site, figuresOf(site)) },
      { title: "Standing", node: (site) => standingOf(site) },
      { title: "Handshakes", sort: "handshakes", number: true, hide: true, text: (site) => count(site.handshakes) },
      { title: "Refused", sort: "refused", number: true, hide: true, text: (site) => count(sumOf(site.refused)) },
      { title: "Traffic", sort: "bytes", number: true, hide: true, text: (site) => bytes(site.bytes_up + site.bytes_down) },
      { title: "Origins", hide: true, node: (site) => (site.ejected ? badge("bad", `${count(site.origins - site.ejected)} of ${count(site.origins)}`) : h("span", { text: count(site.origins) })) },
    ],
  });
  const poll = new Poll(
    2,
    () => get("/api/v1/sites", { search: search.value.trim(), sort, limit: PAGE, offset }),
    (result) => {
      latest = result;
      problem.hidden = true;
      draw();
    },
    (error) => {
      problem.hidden = false;
      setText(problem, error.message);
    },
  );

  const notices = new Table({
    caption: "Notices",
    key: (status) => status.notice.id,
    onOpen: (status) => openNotice(status),
    columns: [
      { title: "Sent", text: (status) => moment(status.notice.created) },
      { title: "Site", wide: true, text: (status) => status.notice.site },
      { title: "Standing", node: (status) => badge(STANDINGS[status.notice.standing] ?? "info", status.notice.standing) },
      { title: "To", wide: true, hide: true, text: (status) => status.notice.address || `${status.notice.recipient} (in the log)` },
      { title: "State", text: stateOfNotice },
    ],
    empty: "No notice was sent. They are sent to the contact of a site that is over its guideline repeatedly.",
  });
  const throttles = new Table({
    caption: "Throttles that hold",
    key: (throttle) => `${throttle.site} ${throttle.since} ${throttle.addresses}`,
    onOpen: (throttle) => release(throttle.site),
    columns: [
      { title: "Site", text: (throttle) => throttle.site },
      { title: "New handshakes above", text: (throttle) => `${throttle.rate}${throttle.addresses?.length ? `, of ${counted(throttle.addresses.length, "address", "addresses")}` : ""}` },
      { title: "Until", text: (throttle) => time(throttle.until) },
      { title: "Why", wide: true, text: (throttle) => throttle.why },
      { title: "Who", hide: true, text: (throttle) => throttle.who },
    ],
    empty: "Nothing is throttled.",
  });
  const assessed = h("span", { class: "note" });

  const element = h(
    "div",
    { class: "view" },
    h("h1", { class: "unseen", text: "Sites" }),
    panel("Sites", total, h("p", { class: "note", text: "A plan's number of tunnels is a guideline: going over it ends no tunnel and refuses no handshake." }), filterForm("Filter sites", restart, field("Part of a name", search)), problem, table.element, h("div", { class: "pages" }, back, place, next)),
    panel("Throttles", null, throttles.element),
    panel("Notices", assessed, notices.element),
  );

  function figuresOf(site) {
    return assessments.get(site.names[0])?.figures ?? {};
  }

  function standingOf(site) {
    const one = assessments.get(site.names[0]);
    const parts = [];
    if (one) parts.push(badge(STANDINGS[one.standing ?? "within"] ?? "info", one.standing ?? "within"));
    else parts.push(h("span", { class: "note", text: site.guideline == null ? "no guideline" : "not assessed yet" }));
    if (site.removed) parts.push(badge("info", "removed"));
    if (site.throttled) parts.push(badge("warn", "throttled"));
    return h("span", { class: "badges" }, ...parts);
  }

  function draw() {
    if (!latest) return;
    setText(total, `${counted(latest.total, "site")}, counted for ${duration(latest.now - latest.since)}`);
    table.update(latest.sites, search.value ? "No site has such a name." : "There are no sites. They are the [[sites]] tables of the configuration.");
    table.markSorted(sort, DIRECTIONS[sort]);
    setText(place, latest.sites.length ? `${count(offset + 1)} to ${count(offset + latest.sites.length)} of ${count(latest.total)}` : "");
    back.disabled = offset === 0;
    next.disabled = offset + latest.sites.length >= latest.total;
  }

  function drawUsage() {
    const { usage, notices: sent } = app.sources.latest;
    if (usage) {
      assessments = new Map((usage.assessments ?? []).map((one) => [one.site, one]));
      throttles.update(usage.throttles ?? []);
      setText(assessed, usage.problem || (usage.assessed ? `assessed ${ago(usage.assessed, usage.now)}` : "not assessed since the start"));
    } else throttles.update([], app.sources.errors.usage);
    notices.update(sent?.notices ?? [], sent ? undefined : app.sources.errors.notices);
    draw();
  }

  function turn(step) {
    offset = Math.max(0, offset + step);
    poll.now();
  }

  function restart() {
    offset = 0;
    poll.now();
  }

  async function open(site) {
    const name = site.names[0];
    const one = assessments.get(name);
    const chart = new Chart({
      title: "Open tunnels, 7 days", note: "the most at once, and the guideline",
      series: [{ label: "Tunnels" }, { label: "Guideline", dashed: true }], format: count,
      summarise: ([, values]) => `At most ${count(Math.max(0, ...values.filter((value) => value !== null)))} at once${site.guideline == null ? "." : `; the guideline is ${count(site.guideline)}.`}`,
      empty: "The history has nothing about this site yet.",
    });
    const dialog = show(
      site.shown || name,
      one && h("p", { class: "lead" }, badge(STANDINGS[one.standing ?? "within"], one.standing ?? "within"), " ", one.sentence),
      chart.element,
      facts([
        ["Names", site.names.join(", ")], ["Plan", one?.label || site.plan], ["Guideline", site.guideline == null ? "" : counted(site.guideline, "concurrent tunnel")],
        ["Next plan", one?.next_label ?? ""], ["Since", one ? moment(one.since) : ""], ["Open tunnels", count(site.tunnels)],
        ["Peak", figure(figuresOf(site).peak ?? null)], ["95th percentile", figuresOf(site).p95 ? figure(figuresOf(site).p95) : ""],
        ["Share", figuresOf(site).share ? `${percent(figuresOf(site).share)} of ${figuresOf(site).resource}` : ""],
        ["Handshakes", count(site.handshakes)], ...Object.entries(site.refused ?? {}).filter(([, value]) => value).map(([kind, value]) => [`Refused: ${kind}`, count(value)]),
        ["Up", bytes(site.bytes_up)], ["Down", bytes(site.bytes_down)], ["Origins", `${count(site.origins - site.ejected)} of ${count(site.origins)} in use`],
        ["Edge worker", site.worker], ["Plain HTTP", site.http], ["Certificate", site.certificate_days == null ? "" : `${figure(site.certificate_days)} days left`],
      ]),
      h("div", { class: "buttons" },
        h("button", { type: "button", click: () => (dialog.close(), throttle(name)), text: "Throttle …" }),
        h("button", { type: "button", click: () => (dialog.close(), release(name)), text: "Release …" }),
        h("button", { type: "button", click: () => (dialog.close(), mute(name)), text: "Mute notices …" }),
      ),
    );
    dialog.addEventListener("close", () => chart.close());
    try {
      const past = toSeries(await get("/api/v1/history", { site: name, since: "7d", points: 300 }));
      chart.update([past.times, past.peak, past.times.map(() => site.guideline ?? null)], past.span);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setText(chart.empty, error.message);
    }
  }

  function throttle(site) {
    app.act({
      title: `Throttle ${site}`,
      text: "New handshakes above the rate get a 429 for a while. Open tunnels are not touched. Without “against abuse”, the contact of the site must have had a notice before.",
      fields: [
        field("Rate", h("input", { name: "rate", required: true, value: "10/second", autocomplete: "off" }), "As in rate limits, such as 10/second or 100/minute."),
        field("For", h("select", { name: "seconds" }, ...[[600, "10 minutes"], [3600, "1 hour"], [86400, "1 day"]].map(([value, text]) => h("option", { value, text })))),
        field("Why", h("input", { name: "why", required: true, autocomplete: "off" })),
        h("label", { class: "check" }, h("input", { type: "checkbox", name: "abuse", value: "yes" }), "It is against abuse"),
      ],
      button: "Throttle",
      dangerous: true,
      run: async ({ rate, seconds, why, abuse }) => {
        const made = await post(`/api/v1/sites/${encodeURIComponent(site)}/throttle`, { rate, seconds: Number(seconds), why, abuse: abuse === "yes" });
        return `New handshakes of ${made.site} above ${made.rate} get a 429 until ${moment(made.until)}.`;
      },
      done: () => app.sources.refresh("usage"),
    });
  }

  function release(site) {
    app.act({
      title: `Release ${site}`,
      text: "All throttles of the site are lifted.",
      button: "Release",
      run: async () => `${counted((await post(`/api/v1/sites/${encodeURIComponent(site)}/release`)).throttles, "throttle was", "throttles were")} lifted.`,
      done: () => app.sources.refresh("usage"),
    });
  }

  function mute(site) {
    app.act({
      title: `Mute notices about ${site}`,
      text: "No notices are sent about the site for a while. It is assessed all the same.",
      fields: [field("For", h("select", { name: "seconds" }, ...[[0, "not at all: send them again"], [604800, "7 days"], [2592000, "30 days"]].map(([value, text]) => h("option", { value, text, selected: value === 604800 }))))],
      button: "Mute",
      run: async ({ seconds }) => {
        const muted = await post(`/api/v1/sites/${encodeURIComponent(site)}/mute`, { seconds: Number(seconds) });
        return Number(seconds) ? `No notices about ${muted.site} until ${moment(muted.until)}.` : `Notices about ${muted.site} are sent again.`;
      },
      done: () => app.sources.refresh("usage"),
    });
  }

  function openNotice(status) {
    const { notice } = status;
    const dialog = show(
      `Notice about ${notice.site}`,
      h("p", { class: "lead" }, badge(STANDINGS[notice.standing] ?? "info", notice.standing), " ", notice.assessment.sentence),
      facts([["Id", h("code", { text: notice.id })], ["Created", moment(notice.created)], ["Recipient", notice.recipient], ["Address", notice.address], ["State", stateOfNotice(status)],
        ...(status.deliveries ?? []).map((one) => [one.channel, [one.state, counted(one.attempts, "attempt"), one.reason].filter(Boolean).join(", ")])]),
      h("div", { class: "buttons" }, status.acknowledged == null && h("button", { type: "button", click: () => (dialog.close(), acknowledge(notice)), text: "Acknowledge …" })),
    );
  }

  function acknowledge(notice) {
    app.act({
      title: "Acknowledge a notice",
      text: `No further notice about this standing of ${notice.site} is sent while it lasts.`,
      button: "Acknowledge",
      run: async () => {
        await post(`/api/v1/notices/${encodeURIComponent(notice.id)}/ack`);
        return "The notice is acknowledged.";
      },
      done: () => app.sources.refresh("notices"),
    });
  }

  return {
    element,
    show() {
      poll.start();
      drawUsage();
    },
    hide: () => poll.stop(),
    takeOverview: () => {},
    takeSource: drawUsage,
  };
}

const sumOf = (numbers) => Object.values(numbers ?? {}).reduce((sum, value) => sum + value, 0);

function stateOfNotice(status) {
  if (status.acknowledged != null) return `acknowledged${status.acknowledged_by ? ` by ${status.acknowledged_by}` : ""}`;
  if (status.accepted) return "delivered";
  if (status.deliveries?.some((one) => one.state === "given up")) return "not delivered";
  return status.deliveries?.some((one) => one.state === "pending") ? "being delivered" : "in the log";
}

/** A bar of the open tunnels, with marks for the guideline and the peak, and the same in words. */
function comparison(site, figures) {
  if (site.guideline == null) return h("span", { class: "note", text: "no guideline" });
  const peak = Math.max(figures.peak ?? 0, site.tunnels);
  const scale = 100 / (Math.max(site.guideline, peak) * 1.08 || 1);
  const bar = h("span", { class: "bar" });
  const guideline = h("span", { class: "guideline" });
  const most = h("span", { class: "peak" });
  bar.style.width = `${site.tunnels * scale}%`;
  guideline.style.left = `${site.guideline * scale}%`;
  most.style.left = `${peak * scale}%`;
  return h("span", { class: "comparison" }, h("span", { class: "track", "aria-hidden": "true" }, bar, most, guideline), h("span", { class: "note", text: `guideline ${count(site.guideline)}${peak > site.tunnels ? `, peak ${count(peak)}` : ""}` }));
}
