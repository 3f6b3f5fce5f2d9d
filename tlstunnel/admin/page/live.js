// The WebSocket that brings figures every second, and records. It connects again by itself, with back-off.

const FIRST_WAIT = 500;
const LONGEST_WAIT = 15_000;
const STALE_AFTER = 3_500;

/** `onState` is called with "connecting", "live", "stale" or "gone" when that changes, and every second while gone. */
export class Live {
  constructor({ onOverview, onRecords, onState }) {
    this.onOverview = onOverview;
    this.onRecords = onRecords;
    this.onState = onState;
    this.state = "connecting";
    this.retryAt = 0;
    this.heard = 0;
    this.filters = null;
    this.socket = null;
    this.wait = FIRST_WAIT;
    this.timer = 0;
    setInterval(() => this.check(), 1000);
    document.addEventListener("visibilitychange", () => this.watch());
    addEventListener("online", () => this.connect());
  }

  /** Watches records that match, or none with null. */
  watchRecords(filters) {
    this.filters = filters;
    this.watch();
  }

  /** Connects, unless that is done or under way. */
  connect() {
    if (this.socket !== null) return;
    clearTimeout(this.timer);
    this.change("connecting");
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/api/v1/live`);
    this.socket = socket;
    socket.addEventListener("open", () => this.watch());
    socket.addEventListener("message", (event) => this.take(JSON.parse(event.data)));
    socket.addEventListener("close", () => this.lose(socket));
  }

  /** Nobody sees a page in the background, so nothing is sent to it. */
  watch() {
    if (this.socket?.readyState !== WebSocket.OPEN) return;
    const watch = [];
    if (!document.hidden) watch.push("overview");
    if (!document.hidden && this.filters) watch.push("records");
    this.heard = performance.now();
    this.socket.send(JSON.stringify({ watch, records: this.filters ?? { site: "", client: "", verdict: "" } }));
  }

  take(message) {
    if (message.overview) {
      this.heard = performance.now();
      this.wait = FIRST_WAIT;
      this.change("live");
      this.onOverview(message.overview);
    }
    if (message.records) this.onRecords(message.records, message.left_out ?? 0);
  }

  lose(socket) {
    if (socket !== this.socket) return;
    this.socket = null;
    const wait = this.wait * (0.75 + Math.random() / 2);
    this.wait = Math.min(this.wait * 2, LONGEST_WAIT);
    this.retryAt = performance.now() + wait;
    this.timer = setTimeout(() => this.connect(), wait);
    // The admin process is replaced at an upgrade. It is soon back, and that is nothing to be alarmed about.
    this.change(this.state === "live" ? "connecting" : "gone");
  }

  check() {
    const late = this.heard > 0 && !document.hidden && performance.now() - this.heard > STALE_AFTER;
    if (late && (this.state === "live" || this.state === "connecting")) this.change("stale");
    else if (this.state === "gone" || this.state === "stale") this.onState(this.state, this.retryIn());
  }

  /** Seconds until the next attempt. */
  retryIn() {
    return Math.max(0, Math.ceil((this.retryAt - performance.now()) / 1000));
  }

  change(state) {
    // Between attempts it stays "gone" or "stale": a banner that comes and goes helps nobody.
    if (state === this.state || (state === "connecting" && this.state !== "live")) return;
    this.state = state;
    this.onState(state, this.retryIn());
  }
}
