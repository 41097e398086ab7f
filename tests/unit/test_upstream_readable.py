from hhh_router.types import Message
from hhh_router.upstream.openai import readable


def turns(*pairs: tuple[str, str]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in pairs]


def test_what_a_chat_template_would_refuse_is_put_in_its_order() -> None:
    odd = turns(
        ("system", "Be kind"),
        ("user", "a"),
        ("user", "b"),
        ("assistant", ""),
        ("assistant", "c"),
        ("system", "Be brief"),
        ("critic", "d"),
        ("tool", "e"),
        ("user", " "),
    )

    assert [(m.role, m.content) for m in readable(odd)] == [
        ("system", "Be kind"),
        ("user", "a\nb"),
        ("assistant", "c"),
        ("user", "Be brief\nd"),
        ("tool", "e"),
    ]


def test_no_text_of_any_turn_is_lost() -> None:
    said = turns(("critic", "one"), ("system", "two"), ("system", "three"), ("user", "four"))

    assert "\n".join(m.content for m in readable(said)).split("\n") == ["one", "two", "three", "four"]
    assert readable([]) == readable(turns(("user", ""))) == ()
