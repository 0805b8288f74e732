"""The page of `chat.py --web`. Streamlit runs this file from top to bottom when a browser opens the page, and for every
question; a browser's conversation is in its `session_state`."""

import re
from contextlib import closing

import streamlit as st

from llava_sft.chat.questions import Turn, decode_picture, question
from llava_sft.chat.web import Shown
from llava_sft.errors import SftError

MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+.!|$~:-])")
SMALLEST = 160  # pixels that a picture is shown with at least, and at most four times as wide


def show(turn: Turn) -> None:
    """The text as it is: an answer is no Markdown, which could have a browser load pictures from elsewhere."""
    with st.chat_message(turn.role):
        for picture in turn.pictures:
            st.image(picture, width=min(max(picture.width, SMALLEST), 4 * SMALLEST))
        st.text(turn.text.replace("<image>\n" * len(turn.pictures), "", 1))


st.set_page_config(page_title=Shown.title, page_icon="💬")
st.caption(Shown.title)
if st.button("New conversation") or "turns" not in st.session_state:
    st.session_state.turns = []
turns: list[Turn] = st.session_state.turns
for said in turns:
    show(said)

if given := st.chat_input("Ask something; + adds pictures", accept_file="multiple", max_chars=20_000):
    pieces: list[str] = []
    asked = None
    try:
        asked = question(given.text, [decode_picture(file.getvalue(), file.name) for file in given.files])
        show(asked)
        with st.chat_message("assistant"), closing(Shown.model.answer([*Shown.first, *turns, asked])) as answer:
            text = st.empty()
            for piece in answer:
                pieces.append(piece)
                text.text("".join(pieces))
            if Shown.model.was_cut:
                st.caption("cut: --max-new-tokens")
    except SftError as error:
        st.error("  \n".join(MARKDOWN.sub(r"\\\1", line) for line in (error.problem, f"fix: {error.fix}")))
    finally:  # what was said before Stop, too
        if asked and pieces:
            turns += [asked, Turn("assistant", "".join(pieces).strip())]
