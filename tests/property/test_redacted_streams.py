"""Whatever way a reply is cut into chunks: what LiteLLM lets out of it is a beginning of the redacted reply."""

from hypothesis import example, given
from hypothesis import strategies as st

from hhh_router.interfaces.server.guardrail import Wishes, held_chars
from hhh_router.trace import redact_text

WISHES = Wishes(redact=("secrets", "emails"))
KEY = f"-----BEGIN RSA PRIVATE KEY-----\n{'MIIEabc' * 9}\n{'x1y2' * 12}\n-----END RSA PRIVATE KEY-----"
SECRETS = (
    "sk-aaaabbbbccccddddeeee", "password = hunter22", 'api_key: "quoted value"', "Authorization: Bearer abc.def-123",
    "AKIAABCDEFGHIJKLMNOP", f"eyJ{'a' * 40}.{'b' * 900}.{'c' * 43}", "https://me:pass@host.example/x", KEY,
    "someone.else@mail.example",
)  # fmt: skip
PROSE = ("The key is ", "\n", " and then ", "\n\n", "token", ": ", "a - b", "“ü” ", "password", "https://", " " * 9)
REPLIES = st.lists(st.sampled_from(PROSE + SECRETS), min_size=1, max_size=12).map("".join)


@given(REPLIES, st.lists(st.integers(1, 60), min_size=1, max_size=40))
@example(f"Here: {KEY} done", [7])
def test_no_part_of_a_secret_leaves_a_stream(reply: str, sizes: list[int]) -> None:
    final = redact_text(reply, emails=True)
    seen, sent, turn = 0, "", 0

    while seen < len(reply):
        seen += sizes[turn % len(sizes)]
        turn += 1
        said = redact_text(reply[:seen], emails=True)
        sent = said[: max(len(sent), len(said) - held_chars(said, WISHES))]  # as LiteLLM does it

        assert final.startswith(sent)
