"""What an audit lists and counts."""

from __future__ import annotations

from shards.audit.findings import Findings


def test_millions_of_problems_are_counted_but_not_listed():
    findings, total = Findings(limit=3), Findings(limit=4)
    for number in range(10):
        findings.add("image", "a.tar", f"problem {number}")
    total.extend(findings)
    total.extend(findings)
    assert total.counts == {"image": 20}
    assert len(total.listed) == 4
