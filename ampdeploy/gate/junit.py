"""JUnit XML, as GitLab, Jenkins and most others read it.

There is no one standard. What is written here is what the two schemas that tools check against
have in common: Ant's (https://github.com/windyroad/JUnit-Schema) and Jenkins' (junit-10.xsd of its
xUnit plugin).
"""

from __future__ import annotations

import re
from datetime import datetime
from xml.etree import ElementTree

from ampdeploy.gate.finding import Finding, Status
from ampdeploy.gate.gate import Decision
from ampdeploy.gate.views import line

CLASS = "ampdeploy.gate"

# XML 1.0 has no way to write these, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(decision: Decision, *, when: datetime, seconds: float) -> str:
    """One test case per finding.

    What closes the gate is a failure. What is undecided and let through is skipped, so that it is
    seen.

    Args:
        decision: To be written.
        when: When it was made, UTC.
        seconds: How long it took.
    """
    cases = [_case(decision, finding) for finding in decision.findings]
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        {
            "name": _text(f"{decision.model} on {decision.target}"),
            "package": CLASS,
            "id": "0",
            "timestamp": when.strftime("%Y-%m-%dT%H:%M:%S"),
            "hostname": "localhost",  # results name no machine
            "tests": str(len(cases)),
            "failures": str(sum(case.find("failure") is not None for case in cases)),
            "errors": "0",
            "skipped": str(sum(case.find("skipped") is not None for case in cases)),
            "time": f"{seconds:.3f}",
        },
    )
    ElementTree.SubElement(suite, "properties")
    suite.extend(cases)
    out = "\n".join(map(line, decision.findings))
    ElementTree.SubElement(suite, "system-out").text = _text(f"{decision.headline}\n{out}")
    ElementTree.SubElement(suite, "system-err")
    ElementTree.indent(root, " ")
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _case(decision: Decision, finding: Finding) -> ElementTree.Element:
    case = ElementTree.Element(
        "testcase", {"name": _text(finding.name), "classname": CLASS, "time": "0.000"}
    )
    blocks = decision.blocks(finding)
    if blocks or finding.status in (Status.UNDECIDED, Status.SKIPPED):
        about = {"message": _text(f"{finding.measured}: {finding.reason}")}
        if blocks:
            about["type"] = finding.status.value
        child = ElementTree.SubElement(case, "failure" if blocks else "skipped", about)
        child.text = _text(line(finding))
    return case


def _text(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
