// The panel that opens a WebSocket through the tunnel. It is a page of its own, which may connect to any wss:// address.

import { ApiError, get } from "./api.js";
import { h, panel } from "./dom.js";

export function tryView() {
  let made = false;
  const holder = h("div", { class: "try" });
  const note = h("span", { class: "note", text: "a WebSocket from this browser, through the tunnel" });
  const element = h("div", { class: "view" }, h("h1", { class: "unseen", text: "Try it" }), panel("Try it", note, holder));
  return {
    element,
    async show() {
      // Made once, so that a conversation goes on while another view is shown.
      if (made) return;
      made = true;
      const address = await suggest();
      holder.append(h("iframe", { src: `/try#${encodeURIComponent(address)}`, title: "Try a WebSocket through the tunnel" }));
    },
    hide: () => {},
    takeOverview: () => {},
  };
}

/** Returns an address of the tunnel: the name of a site with the port of a listener; "" if nothing is known. */
async function suggest() {
  try {
    const [{ listening }, { sites }] = await Promise.all([get("/api/v1/status"), get("/api/v1/sites", { limit: 1, sort: "tunnels" })]);
    const listener = listening.find((one) => !one.startsWith("unix:"));
    const name = (sites[0]?.names ?? []).find((one) => one !== "*") ?? location.hostname;
    const port = listener?.match(/:(\d+)$/)?.[1] ?? "443";
    return `wss://${name.replace("*", "www")}${port === "443" ? "" : `:${port}`}/`;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    return "";
  }
}
