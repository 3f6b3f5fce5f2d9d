// What needs attention, the worst first: a list computed from what the tunnel reports.

import { count, counted, day, duration, time } from "./format.js";

const ORDER = { bad: 0, warn: 1, info: 2 };
const SOON = 21; // days that a certificate should have left

/** Returns lines with a `level`, a `text` and the view that shows more (`to`), from the latest of each source. */
export function findAttention({ overview, usage, origins, certificates, notices, loads }) {
  const lines = [
    ...fromOverview(overview),
    ...fromOrigins(origins),
    ...fromCertificates(certificates),
    ...fromUsage(usage),
    ...fromNotices(notices),
    ...fromLoads(loads),
  ];
  return lines.sort((one, other) => ORDER[one.level] - ORDER[other.level]);
}

function fromOverview(overview) {
  if (!overview) return [];
  const lines = [];
  if (overview.ending) lines.push({ level: "bad", text: `The tunnel is shutting down (${overview.ending}): it accepts no new connections.`, to: "processes" });
  const processes = overview.processes ?? [];
  const silent = processes.filter((process) => process.state === "not responding");
  if (silent.length) lines.push({ level: "bad", text: `${counted(silent.length, "serving process does", "serving processes do")} not respond.`, to: "processes" });
  if (!processes.some((process) => process.state === "serving") && !overview.ending) lines.push({ level: "bad", text: "No process serves new connections.", to: "processes" });
  const local = processes.filter((process) => process.counting?.startsWith("local"));
  if (local.length) lines.push({ level: "warn", text: `${counted(local.length, "process counts", "processes count")} alone: rate limits do not hold for all of them together.`, to: "processes" });
  if (overview.ledger?.state === "not responding") lines.push({ level: "warn", text: "The ledger does not respond.", to: "processes" });
  const history = overview.ledger?.history;
  if (history?.problem) lines.push({ level: "warn", text: `The history is not written: ${history.problem}.`, to: "processes" });
  if (overview.admin?.state === "not responding") lines.push({ level: "warn", text: "The admin process does not respond.", to: "processes" });
  lines.push(...(overview.shortages ?? []).map((text) => ({ level: "bad", text, to: "processes" })));
  const draining = processes.filter((process) => process.state === "draining");
  if (draining.length && !overview.ending) {
    const tunnels = draining.reduce((sum, process) => sum + (process.tunnels ?? 0), 0);
    lines.push({ level: "info", text: `${counted(draining.length, "earlier process drains", "earlier processes drain")}, with ${counted(tunnels, "tunnel")} left.`, to: "processes" });
  }
  return lines;
}

function fromOrigins(origins) {
  return (origins?.origins ?? [])
    .filter((origin) => origin.state !== "healthy" && (origin.state !== "unresolved" || origin.problem))
    .slice(0, 5)
    .map((origin) => {
      const why = origin.problem ? `: ${origin.problem}` : "";
      const level = origin.state === "trial" ? "warn" : "bad";
      const states = { ejected: "is not used for now", trial: "is being tried again", down: "is down", unresolved: "has no address" };
      return { level, text: `Origin ${origin.address} of ${origin.site} ${states[origin.state] ?? origin.state}${why}.`, to: "origins" };
    });
}

function fromCertificates(certificates) {
  return (certificates?.certificates ?? [])
    .filter((one) => one.problem || one.days < SOON)
    .slice(0, 5)
    .map((one) => {
      const name = one.names[0] ?? one.subject;
      if (one.problem) return { level: "bad", text: `The certificate for ${name}: ${one.problem}.`, to: "certificates" };
      if (one.days < 0) return { level: "bad", text: `The certificate for ${name} expired on ${day(one.not_after)}: clients refuse it.`, to: "certificates" };
      return { level: one.days < 7 ? "bad" : "warn", text: `The certificate for ${name} expires in ${duration(one.days * 86_400)}.`, to: "certificates" };
    });
}

function fromUsage(usage) {
  if (!usage) return [];
  const lines = (usage.warnings ?? []).map((text) => ({ level: "warn", text, to: "sites" }));
  const assessments = usage.assessments ?? [];
  for (const one of assessments.filter((one) => one.standing === "suspected abuse").slice(0, 5)) {
    lines.push({ level: "bad", text: `${one.site}: ${one.sentence}`, to: "sites" });
  }
  const busy = assessments.filter((one) => one.standing === "disproportionate");
  lines.push(...busy.slice(0, 5).map((one) => ({ level: "warn", text: `${one.site}: ${one.sentence}`, to: "sites" })));
  const over = assessments.filter((one) => one.standing === "sustained" || one.standing === "repeated");
  if (over.length) lines.push({ level: "info", text: `${counted(over.length, "site is", "sites are")} over the guideline repeatedly. Nothing is refused for that.`, to: "sites" });
  for (const one of (usage.throttles ?? []).slice(0, 5)) {
    lines.push({ level: "warn", text: `New handshakes of ${one.site} are throttled to ${one.rate} until ${time(one.until)}.`, to: "sites" });
  }
  return lines;
}

function fromNotices(notices) {
  const lost = (notices?.notices ?? []).filter((one) => !one.accepted && one.acknowledged == null && one.deliveries?.some((delivery) => delivery.state === "given up"));
  return lost.length ? [{ level: "warn", text: `${counted(lost.length, "notice")} could not be delivered.`, to: "sites" }] : [];
}

function fromLoads(loads) {
  const last = loads?.loads?.[0];
  if (!last?.problems?.length) return [];
  const more = last.problems.length > 1 ? ` (and ${count(last.problems.length - 1)} more)` : "";
  return [{ level: "warn", text: `The last ${last.what} failed, and changed nothing: ${last.problems[0]}${more}`, to: "processes" }];
}
