"""Prompts on which tokenizers disagree."""

from __future__ import annotations

import random

WORDS = (
    "café",
    "naïve coöperation",
    "Straße",
    "日本語",
    "Ελλάδα",
    "“quoted”",
    "it’s",
    "€5 — ½ price",
    "Žluťoučký kůň",
    "👍🏽",
)

MOJIBAKE = (
    *(word.encode().decode("latin-1") for word in WORDS),
    *(word.encode().decode("cp1252", "replace") for word in WORDS),
    *(word.encode().decode("latin-1").encode().decode("latin-1") for word in WORDS[:4]),  # twice
    *(word.encode().decode("cp437") for word in WORDS[:3]),
    *(word.encode().decode("mac-roman") for word in WORDS[:3]),
    "caf\xe9 \x93quoted\x94 \x85",
    "l\u2019humanit\u00c3\u00a9",
    "schÃ¶n &amp; gut",
    "Ã\xa0 la carte",
    "Â«oiseauÂ»",
    "broken \ufffd mark",
    "lone \ud800 surrogate",
    "pair \ud83d\udc4d of surrogates",
)  # fmt: skip

HTML = (
    *("a &amp; b", "a &amp;amp; b", "a &amp;amp;amp; b", "&lt;b&gt;bold&lt;/b&gt;", "<b>bold &amp; strong</b>"),
    *("&quot;red&quot; circle", "red&nbsp;circle", "red&#32;circle", "red&#x20;circle", "&#60;&#62;", "&hearts; card"),
    *("&notit;", "&not an entity", "&copy2024", "&#xD800;", "&#0;x", "&#128;", "&#x1F98A;", "&#99999999;", "&;"),
    *("caf&eacute;", "CAF&EACUTE;", "&amp;eacute;", "&amp;#233;", "e&#x301;", "&#105;&#x307;", "&ZeroWidthSpace;x"),
    *("&lt;end_of_text", "a<b", "a < b > c", "x&ltx", "&Tab;x&NewLine;y"),
)  # fmt: skip

SPACES = (
    *("red circle", "RED  Circle", "  red\tcircle\n", "red\u00a0circle", "red\u3000circle", "red\u2028circle"),
    *("red\u200bcircle", "red\u2060circle", "red\u00adcircle", "\ufeffred circle", "red\u180ecircle"),
    *("red\r\ncircle", "red\x0bcircle", "red\x0ccircle", "red\x1ccircle", "red\x1fcircle", "red\x85circle"),
    *("a\x00b", "a\x07b", "a\x1b[31mred\x1b[0m", "a\x7fb", "\u202ered\u202c circle", "\u2066red\u2069"),
    *("red\u2009thin", "red \u200b circle", "a \u00a0 b"),
)  # fmt: skip

LETTERS = (
    *("İstanbul", "ISTANBUL ılık", "Straße STRASSE ẞ", "ﬁne ﬂag oﬃce", "ǅ ǆ Ǆ", "ΑΣ ΣΑΣ", "K Å Ω", "ſhip 'ſ"),
    *("it'ſ", "DON'T I'LL I'M", "we've they're he'd", "don’t ‘quoted’", "'tis 'S", "o'clock's", "''s", "'re're"),
    *("ｆｕｌｌ　ｗｉｄｔｈ", "ＦＵＬＬ１２３", "ﾊﾝｶｸ", "①②③", "ℌ𝔢𝔩𝔩𝔬", "𝕣𝕖𝕕 circle", "x² + y³", "½ ¼ ⅓"),
    *("e\u0301 é", "n\u0303", "a\u0323\u0302", "q\u0307\u0323", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢", "Å Å Å", "i\u0307", "각 각"),
    *("日本語 の 円", "红色的圆", "빨간 원", "สีแดง", "लाल घेरा", "எழுத்து", "ქართული", "ᏣᎳᎩ ꭰ", "Привет Мир"),
    *("دائرة حمراء", "עיגול אדום", "الْعَرَبِيَّة", "لا ﷺ ﻼ", "\u0660\u0661\u0662", "१२३", "Ⅷ ⅷ"),
)  # fmt: skip

SIGNS = (
    *("!#", "!a", "!!", "! a", "!!!!!!!!a", "a!", "?!", "!?", "...", "…", "--", "—", "a_b", "snake_case_name", "a-b"),
    *("C++", "c#", "100%", "$5.99", "#tag @user", "a/b\\c", "(red) [blue] {green}", "~`^|", "\"'\"", "<>", "&", "*"),
    *("1234 5,6;7", "3.14159", "1e-5", "0x1F", "2024-11-21T15:00:00Z", "http://a.b/c?d=e&f=g", "a@b.co", "a.b.c"),
    *("🦊🦊", "👩‍👩‍👧‍👦 family", "👍🏽", "🇰🇷 flag", "❤️ ❤", "🏳️‍🌈", "1️⃣", "☺ :) <3", "©®™", "♥♦", "→⇒", "∞≠≤"),
)  # fmt: skip

SPECIAL = (
    *("<|startoftext|>", "<|endoftext|>", "red<|endoftext|>circle", "<|EndOfText|>", "<| endoftext |>"),
    *("<start_of_text>", "<end_of_text>", "<END_OF_TEXT>", "red <end_of_text> circle", "&lt;end_of_text&gt;"),
    *("<\u017ftart_of_text>", "<pad>", "[CLS] [SEP]", "</w>", "a</w>b", "<end_of_text", "startoftext"),
)  # fmt: skip

LONG = (
    "a" * 40,
    "a" * 1000,
    "antidisestablishmentarianism",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "red " * 29 + "red",
    "red " * 30 + "red",
    "red " * 500,
    "1" * 31,
    "é" * 20,
    "红" * 20,
    " " * 900 + "red",
)

NASTY = tuple(dict.fromkeys((*MOJIBAKE, *HTML, *SPACES, *LETTERS, *SIGNS, *SPECIAL, *LONG)))


def random_strings(count: int, seed: int) -> list[str]:
    """Short strings of everything above, cut into characters and mixed."""
    chance = random.Random(seed)
    characters = [*"".join((*MOJIBAKE, *HTML, *SPACES, *LETTERS, *SIGNS)), *"  '&;!aeiost"]
    return ["".join(chance.choices(characters, k=chance.randint(1, 24))) for _ in range(count)]
