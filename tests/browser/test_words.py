import json
import re

from tests.browser.conftest import FAKE, ROOT, serving

SPOKEN = """() => {
    const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const node = walk.currentNode;
        if (node.nodeType === Node.TEXT_NODE) {
            if (!node.parentElement.closest("script, style, code, option, textarea, pre, #lw-dataset-problems")) found.push(node.data);
        } else for (const name of ["aria-label", "title", "placeholder"]) found.push(node.getAttribute(name) || "");
    }
    return found;
}"""
NAMES = {"Lorawright", "Ctrl+K", "Ctrl+S", "Ctrl+Enter", "More tabs", "fill", "read"}
"""Names, keys, what Gradio says itself, and buttons that nobody sees. The trainer's messages stay English."""


def unsaid(text: str) -> str:
    """What of a text is in no brackets."""
    while (less := re.sub(r"⟦[^⟦⟧]*⟧", "", text)) != text:
        text = less
    return text.strip()


def test_every_word_of_the_page_can_be_said_in_another_language(visit, tmp_path):
    other = tmp_path / "brackets.json"
    english = json.loads((ROOT / "gui" / "words" / "english.json").read_text())
    other.write_text(json.dumps({sentence: f"⟦{sentence}⟧" for sentence in english}))
    with serving(tmp_path / "runs", FAKE, "--language", str(other)) as server:
        server.forget()  # an empty form: images and captions are their owner's words
        page = visit(server)
        for name in ("Folders", "Parameters", "Advanced", "Samples", "Dataset", "Config (JSON)", "Runs", "Tools"):
            page.get_by_role("tab", name=f"⟦{name}⟧").click()
        page.wait_for_selector("#lw-tool-inspect")
        left = {text.strip() for text in page.evaluate(SPOKEN) if re.search(r"[^\W\d_]{2}", unsaid(text))}
    print(*sorted(left), sep="\n")
    assert left <= NAMES
