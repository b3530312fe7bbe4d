"""The audit: one line an event whatever it holds, rotated, for its owner only."""

import json
import os

import pytest
from simulated_security import audit_lines

from mcp_vllm.security import audit as audit_module
from mcp_vllm.security.audit import Audit
from mcp_vllm.security.errors import SecurityError


def test_control_characters_do_not_make_another_line(tmp_path):
    path = tmp_path / "audit"
    audit = Audit(path)
    audit.record("refused", who="a\nb\r\x1b[2J\u2028\x00", session="x" * 1000, bytes=None)
    audit.close()
    (line,) = path.read_bytes().split(b"\n")[:-1]
    assert all(0x20 <= byte < 0x7F for byte in line)
    (event,) = audit_lines(path)
    assert event["who"].startswith("a\nb")
    assert len(event["session"]) == audit_module.MAX_VALUE_CHARS
    assert "bytes" not in event
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_it_is_rotated_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_module, "FILE_BYTES", 1000)
    monkeypatch.setattr(audit_module, "OLD_FILES", 2)
    audit = Audit(tmp_path / "audit")
    for number in range(100):
        audit.record("session", who="me", bytes=number)
    audit.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    assert all(path.stat().st_size <= 1000 for path in files)
    assert json.loads(files[0].read_text().splitlines()[-1])["bytes"] == 99


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(SecurityError, match=r"security\.audit_file"):
        Audit(tmp_path / "no" / "audit")
    Audit(None).record("session")


def test_a_failing_disk_is_one_line_in_the_log(tmp_path, caplog):
    audit = Audit(tmp_path / "audit")
    audit._file.stream.close()
    audit._file.stream = open("/dev/full", "w")  # noqa: SIM115
    audit.record("session")
    audit.record("session")
    assert len(caplog.records) == 1
