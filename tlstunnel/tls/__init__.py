"""TLS on the wire: the ClientHello, and the end of a stream."""
