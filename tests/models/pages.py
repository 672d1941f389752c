"""A page of HTML read strictly, for the tests of reports."""

import base64
import html.parser
import io
import re

from PIL import Image

VOID = {"meta", "img", "line", "circle", "polyline"}


class Page(html.parser.HTMLParser):
    """A page's tags, texts and pictures; every tag must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    def images(self):
        """(description, picture) of each."""
        found = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        alts = [value for tag, name, value in self.attributes if (tag, name) == ("img", "alt")]
        data = [base64.b64decode(source.removeprefix("data:image/jpeg;base64,"), validate=True) for source in found]
        return [(alt, Image.open(io.BytesIO(item))) for alt, item in zip(alts, data, strict=True)]


def open_page(path):
    """The page, which asks for nothing outside itself."""
    text = path.read_text(encoding="utf-8")
    parsed = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & set(parsed.tags)
    for tag, name, value in parsed.attributes:
        assert name not in ("onload", "onerror", "onclick", "srcset"), (tag, name)
        if name in ("src", "href"):
            assert value.startswith(("data:image/jpeg;base64,", "#")), (tag, value[:80])
    assert not re.search(r"https?:|url\(|@import", text)
    return parsed
