"""Text as the project cuts it: sentences."""

import re


def sentences(text: str) -> list[str]:
    """Split after . ! or ? and a blank: "Rolm fell. So did Varbon." -> ["Rolm fell.", "So did
    Varbon."]. Not after "Mr.", "Mrs.", "Dr.", "St." or an initial. One line each, however the text
    is wrapped.
    """
    ends = r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)\s+"
    return [" ".join(s.split()) for s in re.split(ends, text) if s.strip()]
