// What several views show and changes slowly: asked for once for all of them.

import { Poll, get } from "./api.js";

const REQUESTS = {
  usage: [15, () => get("/api/v1/usage")],
  notices: [15, () => get("/api/v1/notices")],
  origins: [5, () => get("/api/v1/origins", { unhealthy: true, limit: 20 })],
  certificates: [60, () => get("/api/v1/certificates", { limit: 20 })],
  loads: [15, () => get("/api/v1/loads")],
};

/** Returns the sources: `latest` has what was answered last, `errors` why that is old. `onChange` is called then. */
export function sources() {
  const polls = new Map();
  const shared = {
    latest: {},
    errors: {},
    onChange: () => {},
    start() {
      for (const poll of polls.values()) poll.start();
    },
    stop() {
      for (const poll of polls.values()) poll.stop();
    },
    /** Asks now: for one of them, or all. */
    refresh(name) {
      for (const [other, poll] of polls) if (poll.running && (!name || name === other)) poll.now();
    },
  };
  for (const [name, [seconds, request]] of Object.entries(REQUESTS)) {
    polls.set(
      name,
      new Poll(
        seconds,
        request,
        (value) => {
          shared.latest[name] = value;
          delete shared.errors[name];
          shared.onChange(name);
        },
        (error) => {
          shared.errors[name] = error.message;
          shared.onChange(name);
        },
      ),
    );
  }
  document.addEventListener("visibilitychange", () => (document.hidden ? shared.stop() : shared.start()));
  return shared;
}
