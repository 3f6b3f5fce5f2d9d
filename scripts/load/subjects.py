"""The programs that scripts/bench measures with the same job: their commands and configurations.

They are templates of `string.Template`: `$port` to listen on and `$origin` to connect to (both 127.0.0.1), `$cert`,
`$key` and `$pem` (both in one file), `$dir` for the subject's own files, `$descriptors` to allow, `$tunnels` to allow
(two descriptors each), and `$user` to switch to if run by root.

Each has one process or one worker, TLS 1.3 with AES-128-GCM and X25519 (the client offers nothing else), its default
session tickets, and a line per connection in a log file if the program has such a log. Everything else is as in its
manual or in Debian's configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

HAPROXY = """\
global
    log stderr format raw daemon
    nbthread 1
    maxconn $tunnels
    ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
    ssl-default-bind-options ssl-min-ver TLSv1.3
defaults
    mode http
    log global
    option httplog
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    timeout tunnel 1h
frontend tls
    bind 127.0.0.1:$port ssl crt $pem curves X25519 alpn http/1.1
    default_backend origin
backend origin
    option forwardfor
    server origin 127.0.0.1:$origin
"""

NGINX = """\
daemon off;
worker_processes 1;
worker_rlimit_nofile $descriptors;
pid $dir/nginx.pid;
error_log $dir/nginx-error.log;
events { worker_connections $descriptors; }
http {
    access_log $dir/nginx-access.log;
    client_body_temp_path $dir/body;
    proxy_temp_path $dir/proxy;
    fastcgi_temp_path $dir/fastcgi;
    uwsgi_temp_path $dir/uwsgi;
    scgi_temp_path $dir/scgi;
    server {
        listen 127.0.0.1:$port ssl backlog=4096;
        ssl_certificate $cert;
        ssl_certificate_key $key;
        ssl_protocols TLSv1.3;
        ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
        ssl_ecdh_curve X25519;
        location / {
            proxy_pass http://127.0.0.1:$origin;
            proxy_http_version 1.1;
            proxy_set_header Upgrade $$http_upgrade;
            proxy_set_header Connection upgrade;
            proxy_set_header Host $$http_host;
            proxy_set_header X-Forwarded-For $$remote_addr;
            proxy_read_timeout 1h;
            proxy_send_timeout 1h;
        }
    }
}
"""

HITCH = """\
frontend = "[127.0.0.1]:$port"
backend = "[127.0.0.1]:$origin"
pem-file = "$pem"
tls-protos = TLSv1.3
ciphersuites = "TLS_AES_128_GCM_SHA256"
ecdh-curve = "X25519"
alpn-protos = "http/1.1"
workers = 1
backlog = 4096
daemon = off
user = "$user"
"""

STUNNEL = """\
foreground = yes
pid =
output = $dir/stunnel.log
debug = notice
[tunnel]
accept = 127.0.0.1:$port
connect = 127.0.0.1:$origin
cert = $cert
key = $key
sslVersionMin = TLSv1.3
ciphersuites = TLS_AES_128_GCM_SHA256
curves = X25519
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
TIMEOUTidle = 3600
"""


SUBJECT_CORE = 0


@dataclass(frozen=True, slots=True)
class Subject:
    """A program to measure, with its command and files."""

    name: str
    command: tuple[str, ...]
    logging: str = "unknown"
    files: Mapping[str, str] = field(default_factory=dict)
    version: tuple[str, ...] = ()
    package: str = ""
    is_peer: bool = True
    forks: bool = False  # its workers are separate processes, which callgrind does not follow
    cores: tuple[int, ...] = (SUBJECT_CORE,)


PEERS = {
    peer.name: peer
    for peer in (
        Subject(
            name="haproxy",
            command=("haproxy", "-db", "-f", "$dir/haproxy.cfg"),
            files={"haproxy.cfg": HAPROXY},
            logging="one line a connection, at its end, written to a file through stderr",
            version=("haproxy", "-v"),
            package="haproxy",
        ),
        Subject(
            name="nginx",
            command=("nginx", "-e", "$dir/nginx-error.log", "-c", "$dir/nginx.conf"),
            files={"nginx.conf": NGINX},
            logging="one line a connection, at its end, to a file",
            version=("nginx", "-v"),
            forks=True,
            package="nginx-light",
        ),
        Subject(
            name="hitch",
            command=("hitch", "--config=$dir/hitch.conf"),
            files={"hitch.conf": HITCH},
            logging="none: it has no line for a connection; it reads no HTTP either",
            version=("hitch", "--version"),
            forks=True,
            package="hitch",
        ),
        Subject(
            name="stunnel",
            command=("stunnel", "$dir/stunnel.conf"),
            files={"stunnel.conf": STUNNEL},
            logging="level notice (its default): lines when a connection begins and ends; it reads no HTTP",
            version=("stunnel", "-version"),
            package="stunnel4",
        ),
    )
}


def tunnel(program: str) -> Subject:
    """Return tlstunnel itself as a subject; `program` is its path."""
    return Subject(
        name="tlstunnel",
        command=(
            *(program, "start", "127.0.0.1:$origin", "--listen", "127.0.0.1:$port"),
            *("--cert", "$cert", "--key", "$key", "--log-format", "json"),
        ),
        logging="one line a connection, at its end, written to a file through stderr",
        version=(program, "--version"),
        is_peer=False,
    )
