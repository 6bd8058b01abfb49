"""The page in a real browser, where there is one: a stored conversation is shown, and attacks in it are only text."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import uvicorn
from test_serve import ATTACKS, Script

from stateofgpt.data.feedback import FeedbackStore
from stateofgpt.serve import process as server
from stateofgpt.serve.app import create_app
from stateofgpt.text.chat import Message, ToolCall

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_a_stored_conversation_is_shown_and_attacks_in_it_are_text(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        attack = "<script>document.title='owned'</script>" + "\n\n".join(ATTACKS)
        question = store.add_message(store.new_conversation(), None, (Message("user", attack),))
        call = ToolCall("calculator", {"expression": "<img src=x onerror=\"document.title='owned'\">"})
        turn = (Message("assistant", "", (call,)), Message("tool", attack), Message("assistant", attack))
        store.add_message(question.conversation, question.id, (Message("assistant", "the first answer"),))
        answer = store.add_message(question.conversation, question.id, turn, model="<b>model</b>")
        store.rate(answer.id, "k", "down", correction=attack)
        listener = server.listen("127.0.0.1", 0)
        running = uvicorn.Server(uvicorn.Config(create_app(Script(), store), log_level="warning", ws="none"))
        thread = threading.Thread(target=lambda: running.run(sockets=[listener]), daemon=True)
        thread.start()
        try:
            address = f"http://127.0.0.1:{listener.getsockname()[1]}/#{question.conversation}"
            flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
            command = [str(BROWSER), *flags, "--virtual-time-budget=4000", "--dump-dom", address]
            page = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        finally:
            running.should_exit = True
            thread.join(10)
            listener.close()
    assert "<title>run:rl · stateofgpt</title>" in page
    assert "2/2" in page and "You corrected it to" in page and "1 down, 1 correction: 1 comparison" in page
    assert "<img src=" not in page.replace('<img src="/icon.svg"', "") and "<iframe" not in page
    assert page.count("<script") == 1 and "javascript:alert" in page
