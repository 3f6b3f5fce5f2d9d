"""The WebSocket handshake, sans-IO: bytes in, values out. RFC 6455 section 4, RFC 9110, RFC 9112."""
