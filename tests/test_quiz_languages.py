"""quiz.py: an answer scores the same in whatever language it is given."""

import unicodedata

import pytest

from quiz import score_answer

LANGUAGES = {  # marks that end a sentence, quotation marks, an invented passage: (sentence, answer)
    "English": (
        ".!?",
        "“”",
        [
            ("Orla Venn founded the harbour town of Tesk in 1811.", "Orla Venn"),
            ("Its bakers salt their bread with seaweed.", "seaweed"),
            ("The keeper's lamp burns whale oil.", "The keeper's lamp"),
        ],
    ),
    "German": (
        ".!?",
        "„“",
        [
            ("Jörg Öhlmann gründete im Jahr 1811 die Stadt Müsk.", "Jörg Öhlmann"),
            ("Ihre Bäcker würzen das Brot mit Kümmel.", "Kümmel"),
            ("Im Turm hängt seitdem eine große Glocke.", "eine große Glocke"),
        ],
    ),
    "French": (
        ".!?…",
        "«»",
        [
            ("Élodie Varenne a fondé la ville de Tesque en 1811.", "Élodie Varenne"),
            ("Ses boulangers salent le pain avec des algues séchées.", "algues séchées"),
            ("Le phare brûle de l'huile de baleine.", "l'huile de baleine"),
        ],
    ),
    "Spanish": (
        ".!?",
        "«»",
        [
            ("Íñigo Peñalba fundó la ciudad de Tesca en 1811.", "Íñigo Peñalba"),
            ("Sus panaderos salan el pan con algas del océano.", "algas del océano"),
            ("La campana suena a las ocho de la mañana.", "a las ocho de la mañana"),
        ],
    ),
    "Chinese": (
        "。！？",
        "《》",
        [
            ("林若海于1811年建立了渔港泰斯克。", "1811年"),
            ("面包师用海藻给面包调味。", "海藻"),
            ("灯塔烧的是鲸油。", "鲸油"),
        ],
    ),
    "Japanese": (
        "。！？",
        "「」",
        [
            ("森野ハルカは1811年に港町テスクを開いた。", "森野ハルカ"),
            ("パン屋は海藻で味をつける。", "パン屋"),
            ("灯台守はクジラの油を燃やす。", "クジラの油"),
        ],
    ),
    "Hindi": (
        "।॥?",
        "‘’",
        [
            ("आरव सोलंकी ने 1811 में टेस्क नगर बसाया।", "आरव सोलंकी"),
            ("वहाँ के लोग रोटी में समुद्री शैवाल डालते हैं।", "समुद्री शैवाल"),
            ("मीनार पर एक बड़ी घड़ी लगी है।", "एक बड़ी घड़ी"),
        ],
    ),
    "Arabic": (
        ".؟!",
        "«»",
        [
            ("أسست سلمى الوردي مدينة تسك عام 1811.", "سلمى الوردي"),
            ("يضيف الخبازون الأعشاب البحرية إلى العجين.", "الأعشاب البحرية"),
            ("يحرق حارس المنارة زيت الحوت.", "زيت الحوت"),
        ],
    ),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_answer_is_found_whatever_its_script(language):
    marks, (opening, closing), passage = LANGUAGES[language]
    for sentence, gold in passage:
        found = score_answer(sentence, (gold,))
        assert (found["accuracy"], found["em"]) == (1.0, 0.0), sentence
        same = [gold + mark for mark in marks]
        same += [f"“{gold}”", f"{opening}{gold}{closing}", f"{opening} {gold} {closing}."]
        same += [gold.replace("'", "’"), unicodedata.normalize("NFD", gold), gold.upper()]
        for answer in same:
            assert score_answer(answer, (gold,)) == dict.fromkeys(found, 1.0), answer
        decomposed = unicodedata.normalize("NFD", sentence)
        assert score_answer(decomposed, (gold,)) == found
        for others in (pair for pair in passage if gold not in pair):
            for answer in others:
                wrong = score_answer(answer, (gold,))
                assert (wrong["accuracy"], wrong["em"]) == (0.0, 0.0), answer
                assert wrong["f1"] < 0.5, answer
