"""An audit log: one line of JSON for each handshake that passes the firewall, before it goes to the origin.

    [[sites]]
    names = ["chat.example.com"]
    origins = ["10.0.0.5:3000"]
    worker = "edge/audit_log.py:fetch"

The line is the `event` of a line in the tunnel's log whose `logger` ends in "audit". Select it by that. The
connection's own record, with the same `id`, has the result.

The line leaves out what is likely to be a secret: cookies, Authorization, the query, subprotocols. What the client
chose is percent-encoded if it could break the line, and cut. The tunnel does not wait for the log's reader: lines
that it does not read are lost, and counted (``log lines lost``).
"""

import json
import logging
from urllib.parse import quote

from tlstunnel.edge import WorkerRequest

AUDIT = logging.getLogger(f"{__name__}.audit")
LONGEST = 200
SAFE = " !#$&'()*+,/:;<=>?@[]^_`{|}~"  # visible ASCII without quote, backslash and percent sign


async def fetch(request: WorkerRequest, env: None) -> WorkerRequest:
    """Write the line."""
    certificate = request.client_certificate
    facts = {
        "id": request.id,
        "client": request.client_address,
        "site": request.site,
        "host": request.host,
        "path": request.path,
        "page": request.headers.get("Origin", ""),
        "user_agent": request.headers.get("User-Agent", ""),
        "certificate": certificate.subject if certificate else "",
        "tls": request.tls.version,
        "ja4": request.tls.ja4,
    }
    AUDIT.info(json.dumps({name: quote(value[:LONGEST], safe=SAFE) for name, value in facts.items()}))
    return request
