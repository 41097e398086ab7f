"""One server for all tests of this folder, and a database for each."""

import os
from collections.abc import Iterator
from itertools import count

import pytest

psycopg = pytest.importorskip("psycopg", reason="needs the extra postgres")

from .server import VARIABLE, Server, programs  # noqa: E402

_numbers = count(1)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    folder = programs()
    if folder is None:
        assert VARIABLE not in os.environ
        pytest.skip("no Postgres here: make test-postgres brings one")
    made = Server(folder)
    try:
        made.start()
        yield made
    finally:
        made.remove()


@pytest.fixture
def url(server: Server) -> str:
    return server.database(f"audit{next(_numbers)}")
