// Two servers with a route for /admin and all below: `node routers.mjs`. One reads the target with `new URL`, as the
// README of `ws` does, the other is Express. Each responds with "admin" or "other".
// Prints both ports as JSON. Ends with its standard input.
import express from "express";
import { createServer } from "node:http";

const plain = createServer((request, response) => {
  let route = "other";
  try {
    const { pathname } = new URL(request.url, "ws://localhost");
    if (pathname === "/admin" || pathname.startsWith("/admin/")) route = "admin";
  } catch {
    route = "invalid";
  }
  response.end(route);
});

const app = express();
app.all(["/admin", "/admin/*rest"], (_, response) => response.end("admin"));
app.use((_, response) => response.end("other"));
app.use((error, request, response, next) => response.status(400).end("invalid"));
const routed = createServer(app);

const listen = (server) => new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
await Promise.all([listen(plain), listen(routed)]);
console.log(JSON.stringify({ url: plain.address().port, express: routed.address().port }));
process.stdin.on("end", () => process.exit(0)).resume();
