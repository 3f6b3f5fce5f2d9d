// The certificates that are served, those that expire first at the top.

import { Poll, get } from "./api.js";
import { show } from "./dialogs.js";
import { badge, facts, field, filterForm, h, panel, setText } from "./dom.js";
import { counted, day, figure, moment } from "./format.js";
import { Table } from "./table.js";

export function certificatesView() {
  const site = h("input", { type: "search", name: "site", autocomplete: "off" });
  const total = h("span", { class: "note" });
  const table = new Table({
    caption: "Certificates",
    key: (one) => `${one.file} ${one.serial}`,
    onOpen: open,
    columns: [
      { title: "Names", wide: true, text: (one) => one.names.join(", ") || one.subject },
      { title: "Left", node: leftOf },
      { title: "Expires", text: (one) => day(one.not_after) },
      { title: "Issuer", wide: true, hide: true, text: (one) => one.issuer },
      { title: "Key", hide: true, text: (one) => one.key },
      { title: "File", wide: true, hide: true, text: (one) => one.file },
    ],
    empty: "No certificate matches.",
  });
  const poll = new Poll(
    10,
    () => get("/api/v1/certificates", { site: site.value.trim(), limit: 200 }),
    (result) => {
      setText(total, result.total > result.certificates.length ? `the first ${figure(result.certificates.length)} of ${counted(result.total, "certificate")}` : counted(result.total, "certificate"));
      table.update(result.certificates);
    },
    (error) => table.update([], error.message),
  );

  function open(one) {
    show(
      "Certificate",
      h("p", { class: "lead" }, leftOf(one), one.problem && ` ${one.problem}`),
      facts([
        ["Names", one.names.join(", ")], ["Sites", one.sites.join(", ")], ["Subject", one.subject], ["Issuer", one.issuer], ["Key", one.key], ["Serial number", h("code", { text: one.serial })],
        ["Valid from", moment(one.not_before)], ["Valid until", moment(one.not_after)], ["File", one.file],
      ]),
      h("p", { class: "note", text: "A new file at the same place is used within seconds, for new connections." }),
    );
  }

  const element = h(
    "div",
    { class: "view" },
    h("h1", { class: "unseen", text: "Certificates" }),
    panel("Certificates", total, filterForm("Filter certificates", () => poll.now(), field("Site", site)), table.element),
  );
  return { element, show: () => poll.start(), hide: () => poll.stop(), takeOverview: () => {} };
}

function leftOf(one) {
  if (one.problem) return badge("bad", one.problem);
  if (one.days < 0) return badge("bad", "expired");
  const level = one.days < 7 ? "bad" : one.days < 21 ? "warn" : "good";
  return badge(level, counted(Math.floor(one.days), "day"));
}
