"""The outline of pages that open without a network."""

from __future__ import annotations

from streamcnn.support.text import html_text as escape


def html_page(title: str, style: str, body: str, *, also_allowed: str = "") -> str:
    """A page as one HTML file, which its own policy keeps from asking for anything else.

    Parameters
    ----------
    title
        As text.
    style, body
        As CSS and as HTML.
    also_allowed
        What the page may have besides inline styles, as in a content security policy:
        ``"img-src data:"``.
    """
    policy = "; ".join(filter(None, ("default-src 'none'", "style-src 'unsafe-inline'", also_allowed)))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
