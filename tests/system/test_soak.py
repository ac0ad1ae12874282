"""Under kills at random, the account of all items is exact. `make soak` is the long run of the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from soak import Role, soak

SECONDS = float(os.environ.get("SPOOLIPC_SOAK") or 10)

pytestmark = [pytest.mark.fault, pytest.mark.timeout(SECONDS + 200)]


@pytest.mark.parametrize(
    ("roles", "share"),
    [(["write", "write", "get", "receive", "receive"], 0.7), (["write", "write", "receive"], 0.3)],
    ids=["readers of both kinds", "one reader"],
)
def test_every_put_is_delivered_and_acknowledged_once_though_anybody_is_killed_at_any_time(
    tmp_path: Path, roles: list[Role], share: float
) -> None:
    account = soak(tmp_path, SECONDS * share, roles, seed=20)
    print(account)
    assert account.errors == []
    assert account.kills
    assert account.put
    assert account.quarantined
