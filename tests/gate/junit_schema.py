"""What Ant's and Jenkins' schemas of JUnit XML both ask for, as checks.

Ant: https://github.com/windyroad/JUnit-Schema; Jenkins: junit-10.xsd of its xUnit plugin.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

SUITE = {
    "name", "package", "id", "timestamp", "hostname", "tests", "failures", "errors", "skipped",
    "time",
}  # fmt: skip
CASE = {"name", "classname", "time"}


def parse(text: str) -> ElementTree.Element:
    """The one test suite of `text`, checked."""
    root = ElementTree.fromstring(text.encode())
    assert root.tag == "testsuites"
    assert root.attrib == {}  # Ant's allows none
    (suite,) = root
    assert suite.tag == "testsuite"
    assert set(suite.attrib) == SUITE
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp"))
    assert re.fullmatch(r"\d{1,3}\.\d{3}", suite.get("time"))  # Jenkins' pattern is that odd
    assert suite.get("name")
    # Ant's is a sequence.
    order = [child.tag for child in suite]
    assert order[0] == "properties"
    assert order[-2:] == ["system-out", "system-err"]
    assert set(order[1:-2]) <= {"testcase"}
    cases = suite.findall("testcase")
    for case in cases:
        assert set(case.attrib) == CASE
        assert case.get("name") == " ".join(case.get("name").split())  # xs:token
        assert len(case) <= 1
        for child in case:
            assert child.tag in ("failure", "skipped")
            assert child.get("message")
            assert child.tag == "skipped" or child.get("type")
    counted = {"tests": "*", "failures": "failure", "errors": "error", "skipped": "skipped"}
    for name, tag in counted.items():
        count = len(cases) if tag == "*" else sum(c.find(tag) is not None for c in cases)
        assert suite.get(name) == str(count), name
    return suite
