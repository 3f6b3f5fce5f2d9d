"""Certificates: issuing test ones, describing any, serving a site's."""
