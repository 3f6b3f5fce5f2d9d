# docker build -t tlstunnel . && docker run -p 8443:8443 -v ./etc:/etc/tlstunnel:ro tlstunnel
# docs/operations.md#containers

FROM python:3.13-slim AS build
WORKDIR /source
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY tlstunnel tlstunnel
# Compiled here, because the file system is read-only when it runs.
RUN python -m venv /opt/tlstunnel \
 && /opt/tlstunnel/bin/pip install --no-cache-dir --compile . \
 && /opt/tlstunnel/bin/pip uninstall --yes pip

FROM python:3.13-slim
COPY --from=build /opt/tlstunnel /opt/tlstunnel
ENV PATH=/opt/tlstunnel/bin:$PATH PYTHONUNBUFFERED=1 RUNTIME_DIRECTORY=/tmp/tlstunnel
WORKDIR /tmp
USER nobody
EXPOSE 8443
# The tunnel itself is the first process: it receives the SIGTERM of docker stop, and reaps its children.
ENTRYPOINT ["tlstunnel"]
CMD ["start", "--config", "/etc/tlstunnel/tlstunnel.toml", "--log-format", "json"]
