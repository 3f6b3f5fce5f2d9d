"""The files of the dashboard: all that the pages name are there, and nothing else."""

import gzip
import re

from tlstunnel.admin.responses import make_file
from tlstunnel.admin.static import load_files


def test_every_file_that_a_page_names_is_served() -> None:
    files = load_files()
    for path in ("/", "/try"):
        page = files[path].content.decode()
        named = re.findall(r'(?:href|src)="(/[^"]*)"', page)
        assert named
        assert {name for name in named if name.startswith("/static/")} <= files.keys()
        assert "http://" not in page.replace("http://www.w3.org", "")


def test_pages_have_one_path_each() -> None:
    files = load_files()
    assert "/static/index.html" not in files
    assert all(path.startswith("/static/") or path in {"/", "/try"} for path in files)
    assert all(".." not in path for path in files)


def test_policies_name_no_other_server() -> None:
    for path, file in load_files().items():
        assert file.policy.startswith("default-src 'none'")
        assert "unsafe" not in file.policy
        if path != "/try":
            assert "http" not in file.policy
            assert "frame-ancestors 'none'" in file.policy
    assert "frame-ancestors 'self'" in load_files()["/try"].policy


def test_a_file_is_compressed_for_those_who_accept_that() -> None:
    file = load_files()["/"]
    plain = make_file(file, accept_encoding="", if_none_match="")
    small = make_file(file, accept_encoding="gzip, br", if_none_match="")
    assert gzip.decompress(bytes(small.body)) == bytes(plain.body) == file.content
    assert len(small.body) < len(plain.body)
    assert make_file(file, accept_encoding="gzip", if_none_match=file.etag).status_code == 304
