// A Socket.IO application: `node socketio.mjs`. Its page is at `/`; `/?transports=polling` keeps to long polling.
// Prints the port that it listens on. SIGTERM ends it.
import { createServer } from "node:http";
import { Server } from "socket.io";

const PAGE = `<!doctype html><title>A Socket.IO application</title><script src="/socket.io/socket.io.js"></script>
<script>
  const transports = new URLSearchParams(location.search).get("transports");
  const socket = transports ? io({ transports: transports.split(",") }) : io();
  const seen = { transports: [], greetings: [] };
  // Of the manager: when the socket's own "connect" comes, the transport may have been upgraded already.
  socket.io.on("open", () => {
    const { engine } = socket.io;
    seen.transports.push(engine.transport.name);
    engine.on("upgrade", (transport) => seen.transports.push(transport.name));
  });
  socket.on("greeting", (greeting) => seen.greetings.push(greeting));
</script>`;

const http = createServer((request, response) => {
  response.writeHead(200, { "Content-Type": "text/html; charset=utf-8" });
  response.end(PAGE);
});
const io = new Server(http);
io.on("connection", (socket) => {
  // A message is sent back to the page; what the page makes of it is the answer, with the transport that is in use.
  socket.on("ask", async (message, answer) => {
    const returned = await socket.timeout(10_000).emitWithAck("repeat", message);
    answer({ returned, transport: socket.conn.transport.name });
  });
  socket.emit("greeting", socket.handshake.headers["x-forwarded-proto"]);
});
process.on("SIGTERM", () => io.close(() => process.exit(0)));
http.listen(0, "127.0.0.1", () => console.log(`listening on 127.0.0.1:${http.address().port}`));
