"""Formulas as MathML, which browsers draw by themselves: no script, no font, no other host."""

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """Put MathML where the Markdown extension has marked LaTeX."""
    return _FORMULA.sub(_drawn, content)


def _drawn(match: re.Match[str]) -> str:
    tag, inline, block = match.groups()
    display = "inline" if block is None else "block"
    formula = convert(html.unescape(inline if block is None else block).strip(), display=display)
    return f'<{tag} class="formula">{formula}</{tag}>'
