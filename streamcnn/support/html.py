"""The frame of HTML pages that open without a network."""

from __future__ import annotations

from streamcnn.support.text import html_text as escape


def html_page(title: str, style: str, body: str, *, also_allowed: str = "") -> str:
    """A page as one HTML file, whose content security policy forbids it to load anything else.

    Parameters
    ----------
    title
        Plain text.
    style, body
        CSS and HTML.
    also_allowed
        Allowed besides inline styles, in terms of the content security policy, such as
        ``"img-src data:"``.
    """
    policy = "; ".join(filter(None, ("default-src 'none'", "style-src 'unsafe-inline'", also_allowed)))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
