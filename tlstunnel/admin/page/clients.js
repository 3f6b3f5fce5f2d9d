// The panels of the busiest clients and of the firewall's rules.

import { Poll, get } from "./api.js";
import { h, panel, setText } from "./dom.js";
import { count } from "./format.js";
import { Table } from "./table.js";

const RULES = {
  tlstunnel_firewall_rules_total: ["rule", "Rule"],
  tlstunnel_firewall_rate_limits_total: ["limit", "Rate limit"],
  tlstunnel_firewall_managed_rule_matches_total: ["rule", "Managed rule"],
};
const BUSIEST = 200; // tunnels among which clients are counted: a list of all would cost too much
const QUIET = new Set(["passed"]);

export function topClients() {
  const note = h("span", { class: "note" });
  const clients = new Table({
    caption: "Clients with the most tunnels and refusals",
    key: (row) => row.client,
    columns: [
      { title: "Client", text: (row) => row.client || "(Unix socket)" },
      { title: "Tunnels", number: true, text: (row) => count(row.tunnels) },
      { title: "Refused recently", number: true, text: (row) => count(row.refused) },
    ],
    empty: "No client is connected, and none was refused recently.",
  });
  const rules = new Table({
    caption: "What rules and rate limits did since the start",
    key: (row) => `${row.kind} ${row.name} ${row.site} ${row.outcome}`,
    columns: [
      { title: "Rule", text: (row) => row.name },
      { title: "Kind", hide: true, text: (row) => row.kind },
      { title: "Site", text: (row) => row.site },
      { title: "Outcome", text: (row) => row.outcome },
      { title: "Since the start", number: true, text: (row) => count(row.value) },
    ],
    empty: "No rule or rate limit has matched. They are under [[sites.rules]] and [[sites.rate_limits]].",
  });

  const poll = new Poll(
    10,
    async () => Promise.all([get("/api/v1/tunnels", { limit: BUSIEST, sort: "rate" }), get("/api/v1/refusals", { limit: 500 }), get("/api/v1/status")]),
    ([tunnels, refusals, status]) => {
      clients.update(countClients(tunnels.tunnels, refusals.refusals));
      setText(note, tunnels.total > tunnels.tunnels.length ? `of the ${count(tunnels.tunnels.length)} busiest tunnels` : "");
      rules.update(findRules(status.metrics ?? {}));
    },
    (error) => {
      clients.update([], error.message);
      rules.update([], error.message);
    },
  );

  return {
    clientsPanel: panel("Top clients", note, clients.element),
    rulesPanel: panel("Top rules", null, rules.element),
    show: () => poll.start(),
    hide: () => poll.stop(),
  };
}

function countClients(tunnels, refusals) {
  const found = new Map();
  const of = (client) => {
    if (!found.has(client)) found.set(client, { client, tunnels: 0, refused: 0 });
    return found.get(client);
  };
  for (const tunnel of tunnels) of(tunnel.client).tunnels += 1;
  for (const refusal of refusals) of(refusal.record.client ?? "").refused += 1;
  return [...found.values()].sort((one, other) => other.tunnels + other.refused - one.tunnels - one.refused).slice(0, 8);
}

function findRules(metrics) {
  const found = [];
  for (const [family, [label, kind]] of Object.entries(RULES)) {
    for (const { labels, value } of metrics[family] ?? []) {
      if (value > 0 && !QUIET.has(labels.outcome)) found.push({ kind, name: labels[label] ?? "", site: labels.site ?? "", outcome: labels.outcome ?? "matched", value });
    }
  }
  return found.sort((one, other) => other.value - one.value).slice(0, 8);
}
