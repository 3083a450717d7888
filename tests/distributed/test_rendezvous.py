"""How ranks find each other, and what is said at the limit where they do not."""

from __future__ import annotations

import re
import socket
import threading
from pathlib import Path

import pytest

from tests.jobs import ROOT, flags, launch, tiny_config

TRAIN = ROOT / "pipeline/train.py"


def ranks(rank: int, world_size: int, host: str, port: int) -> dict[str, str]:
    """What a launcher puts into the environment of one of them."""
    variables = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": host, "MASTER_PORT": port}
    return {name: str(value) for name, value in variables.items()}


def test_a_process_alone_waits_for_nobody(tiny_dataset: Path, tmp_path: Path) -> None:
    """Whatever a cluster's environment says of a place to meet, and mpirun's of its own processes."""
    variables = ranks(0, 1, "no-such-host.invalid", 29500) | {"LOCAL_RANK": "0", "PMI_SIZE": "2", "PMI_RANK": "1"}
    config = tiny_config(run={"root": str(tmp_path)}, data={"dataset": str(tiny_dataset)}, training={"steps": 1})
    result = launch(TRAIN, flags(config), variables=variables)
    assert result.returncode == 0, result.stderr
    assert "1 rank on CPU" in result.stderr


def test_the_longest_limit_can_be_waited_for(tiny_dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(
        run={"root": str(tmp_path)},
        data={"dataset": str(tiny_dataset)},
        training={"steps": 1},
        runtime={"timeout_seconds": 1_000_000},
    )
    assert launch(TRAIN, flags(config), 2).returncode == 0


@pytest.mark.parametrize(
    ("rank", "host", "port", "reason"),
    [
        (1, "no-such-host.invalid", 29500, "(Name or service|Temporary failure|No address).*"),
        (0, "no-such-host.invalid", 29500, "ranks 1, 2 of 3 did not come"),  # it serves, under whatever name
        (1, "two..dots", 29500, ".*label empty or too long.*"),
        (1, "127.0.0.1", 1, "Connection refused"),
    ],
)
def test_an_address_that_nobody_answers_is_one_line_at_the_limit(
    rank: int, host: str, port: int, reason: str, tmp_path: Path
) -> None:
    config = tiny_config(run={"root": str(tmp_path)}, runtime={"timeout_seconds": 1})
    result = launch(TRAIN, flags(config), variables=ranks(rank, 3, host, port))
    assert result.returncode == 2
    assert_one_line(result.stderr, rank, host, port, reason)
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_no_store_is_one_line_at_the_limit() -> None:
    """As one of the web that has the port; torch logs its attempts with a page of frames each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            try:
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            except OSError:
                return  # closed

        answering = threading.Thread(target=answer)
        answering.start()
        config = tiny_config(runtime={"timeout_seconds": 1})
        result = launch(TRAIN, flags(config), variables=ranks(1, 2, "127.0.0.1", port))
        server.shutdown(socket.SHUT_RDWR)
        answering.join()
    assert result.returncode == 2
    assert_one_line(result.stderr, 1, "127.0.0.1", port, ".+")


def assert_one_line(stderr: str, rank: int, host: str, port: int, reason: str) -> None:
    place = f"{host}:{port}".replace(".", r"\.")
    limit = rf"\[rank {rank}\] error: the ranks did not meet at {place} within runtime\.timeout_seconds 1 "
    fix = r"; the launcher's main_process_ip must name a host that every rank reaches"
    assert re.fullmatch(rf"{limit}\({reason}\){fix}\n", stderr), stderr
