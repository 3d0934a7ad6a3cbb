import gzip

import numpy as np
import pytest

from mmrl.errors import InputError
from mmrl.workloads.readers import read_length_pairs, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2031-01-01 18:15:46.2500000,300,40
2031-01-01 18:15:50.2500000,400,60
2031-01-01 18:15:47.2500000,500,50
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,120,30,150,Conversation log
5,GPT-4,700,200,900,Conversation log
9,ChatGPT,90,0,90,Conversation log
15,ChatGPT,800,100,900,API log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 5000, "output_length": 90, "hash_ids": [0, 1]}
{"timestamp": 0, "input_length": 6000, "output_length": 80, "hash_ids": [0, 2]}
{"timestamp": 3001, "input_length": 10, "output_length": 3, "hash_ids": []}
{"timestamp": 3001, "input_length": 11, "output_length": 3, "hash_ids": []}
"""
BAILIAN = """{"chat_id": 5, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 521, \
"output_length": 132, "type": "text", "turn": 1, "hash_ids": [1, 2]}
{"chat_id": 9, "parent_chat_id": 5, "timestamp": 62.5, "input_length": 60, "output_length": 7}
"""
FUNCTIONS = """HashOwner,HashApp,HashFunction,Trigger,1,2,3
o,a,f1,http,10,0,5
o,a,f2,timer,0,0,0
o,b,f3,http,0,2,0
o,b,f1,queue,1,0,0
"""
OWN = "arrival_s,model,prompt_tokens,output_tokens\n1.5,b,10,20\n1.5,a,30,40\n"
OWN_JSON = """{"arrival_s": 1, "model": "a", "prompt_tokens": 10, "output_tokens": 20}
{"arrival_s": 2, "model": "b", "prompt_tokens": 10, "output_tokens": 20}
"""
BURST_JSON = """{"Timestamp": 1, "Model": "a", "Request tokens": 10, "Response tokens": 20}
{"Timestamp": 2, "Model": "b", "Request tokens": 10, "Response tokens": 20}
"""


@pytest.fixture
def write(tmp_path):
    def write_(text, name="trace.csv"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write_


def test_azure_llm(write):
    trace = read_trace([write(AZURE, "conv.csv")])
    assert trace.arrival_ns.tolist() == [0, 10**9, 4 * 10**9]
    assert trace.prompt_tokens.tolist() == [300, 500, 400]
    assert trace.output_tokens.tolist() == [40, 50, 60]
    assert trace.model_names == ("conv",)
    assert trace.duration_s == 6  # 4 s, and one mean gap of 2 s
    assert trace.notes == (
        "read 3 requests from conv.csv (azure-llm)",
        "sorted conv.csv: 1 rows were before the row ahead",
    )


def test_azure_llm_of_2024_has_time_zones(write):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2031-05-10 00:00:00.012345+00:00,900,5\n"
    assert read_trace([write(text)]).prompt_tokens.tolist() == [900]


def test_several_files_are_services_on_one_clock(write):
    later = AZURE.replace("18:15:4", "18:15:5")
    trace = read_trace([write(AZURE, "conv.csv"), write(later, "code.csv.gz")])
    assert trace.model_names == ("conv", "code")
    assert (trace.arrival_ns[trace.model == 0] // 10**9).tolist() == [0, 1, 4]
    assert (trace.arrival_ns[trace.model == 1] // 10**9).tolist() == [4, 10, 11]


def test_files_of_one_name_are_services_of_their_own(write, tmp_path):
    for folder in ("d1", "d2", "x/d3", "y/d3"):
        (tmp_path / folder).mkdir(parents=True)
    two = [write(AZURE, f"{folder}/conv.csv") for folder in ("d1", "d2")]
    assert read_trace(two).model_names == ("d1/conv.csv", "d2/conv.csv")
    zipped = [write(AZURE, "conv.csv"), write(AZURE, "conv.csv.gz"), write(AZURE, "code.csv")]
    folder = tmp_path.name
    expected = (f"{folder}/conv.csv", f"{folder}/conv.csv.gz", "code")
    assert read_trace(zipped).model_names == expected
    deep = [write(AZURE, f"{folder}/conv.csv") for folder in ("x/d3", "y/d3")]
    assert read_trace(deep).model_names == tuple(map(str, deep))


def test_burstgpt_spreads_within_the_second_and_skips_failures(write):
    trace = read_trace([write(BURSTGPT)], seed=1)
    assert trace.model_names == ("ChatGPT", "GPT-4")
    assert trace.counts.tolist() == [2, 1]
    # The zero is the second of the first request.
    assert (trace.arrival_ns // 10**9).tolist() == [0, 0, 10]
    assert len(set(trace.arrival_ns % 10**9)) == 3
    assert "skipped 1 failed requests of trace.csv (no output)" in trace.notes
    assert any("steps of 1 s" in note for note in trace.notes)
    again = read_trace([write(BURSTGPT)], seed=1)
    assert np.array_equal(trace.arrival_ns, again.arrival_ns)
    assert not np.array_equal(trace.arrival_ns, read_trace([write(BURSTGPT)]).arrival_ns)


def test_mooncake_spreads_up_to_the_next_tick(write):
    trace = read_trace([write(MOONCAKE, "mooncake.jsonl")])
    assert trace.model_names == ("mooncake",)
    assert sorted(trace.prompt_tokens[:2].tolist()) == [5000, 6000]
    assert 0 < trace.arrival_ns[1] < 3_001_000_000 < trace.arrival_ns[2] < 6_002_000_000
    assert any("steps of 3.001 s" in note for note in trace.notes)


def test_bailian_has_the_keys_of_mooncake_but_counts_seconds(write):
    trace = read_trace([write(BAILIAN, "api.jsonl")])
    assert trace.arrival_ns.tolist() == [0, 1_386_000_000]
    assert trace.model_names == ("api",)
    assert trace.prompt_tokens.tolist() == [521, 60] and trace.output_tokens.tolist() == [132, 7]


def test_exact_times_are_not_spread(write):
    exact = MOONCAKE.replace('"timestamp": 0', '"timestamp": 17', 1).replace("3001", "40", 1)
    trace = read_trace([write(exact)])
    assert trace.arrival_ns.tolist() == [0, 17_000_000, 40_000_000, 3_001_000_000]


def test_functions_keep_every_count(write):
    trace = read_trace([write(FUNCTIONS)], lengths="code")
    assert trace.model_names == ("f1", "f3")
    assert trace.duration_s == 180
    counts = np.zeros((2, 3), int)
    np.add.at(counts, (trace.model, trace.arrival_ns // (60 * 10**9)), 1)
    assert counts.tolist() == [[11, 0, 5], [0, 2, 0]]
    assert "drew lengths, which are not recorded, from family code" in trace.notes


def test_own_csv_without_our_comment(write):
    trace = read_trace([write(OWN)])
    assert trace.arrival_ns.tolist() == [1_500_000_000] * 2
    assert trace.model_names == ("b", "a")
    assert not trace.batch_work.any()
    assert trace.notes == ("read 2 requests from trace.csv (mmrl)",)
    classes = OWN.replace("tokens\n", "tokens,class\n").replace("20\n", "20,batch\n")
    trace = read_trace([write("# mine\n\n" + classes.replace("40\n", "40,\n"))])
    assert trace.batch_work.tolist() == [True, False]


def test_own_times_that_begin_far_beyond_zero_are_moved_to_it(write):
    unix = OWN.replace("1.5,b", "1718000000,b").replace("1.5,a", "1718000060.5,a")
    trace = read_trace([write(unix)])
    assert trace.arrival_ns.tolist() == [0, 60_500_000_000]
    assert trace.duration_s == 121
    assert trace.notes[1] == "took the first request, at 1718000000 s, for the zero of time"
    evening = OWN.replace("1.5,b", "30000,b").replace("1.5,a", "30060,a")
    assert read_trace([write(evening)]).arrival_ns[0] == 30_000 * 10**9
    told = read_trace([write('# {"duration_s": 2e9}\n' + unix)])  # what is said is believed
    assert told.arrival_ns[0] == 1_718_000_000 * 10**9 and told.duration_s == 2e9


def test_spaces_around_values_do_not_matter(write):
    spaced = OWN.replace("tokens\n", "tokens,class\n").replace(",20", ", 20, batch")
    trace = read_trace([write(spaced.replace(",b,", ", b ,").replace(",40", ", 40,"))])
    assert trace.model_names == ("b", "a")
    assert trace.batch_work.tolist() == [True, False]


def test_a_file_that_ends_later_than_another_says_counts(write):
    told = '# {"duration_s": 2.0}\n' + OWN
    later = "arrival_s,model,prompt_tokens,output_tokens\n0,b,1,1\n60,c,1,1\n"
    assert read_trace([write(told)]).duration_s == 2
    for text in (later, '# {"duration_s": 90.0}\n' + later):
        for files in ((told, text), (text, told)):
            paths = [write(content, f"{k}.csv") for k, content in enumerate(files)]
            trace = read_trace(paths)
            assert len(trace) == 4
            assert trace.duration_s == (90 if "90" in text else 60 + 60 / 3)


def test_a_byte_order_mark_and_crlf_do_not_matter(write):
    trace = read_trace([write("\ufeff" + AZURE.replace("\n", "\r\n"))])
    assert len(trace) == 3


BAD_ROWS = [
    (AZURE, "400,60", "-400,60", 3, "-400 is not a number of tokens"),
    (AZURE, "400,60", "nan,60", 3, "nan is not a number of tokens"),
    (AZURE, "400,60", "40.5,60", 3, "40.5 is not a number of tokens"),
    (AZURE, "400,60", "400", 3, "2 fields where the header has 3"),
    (AZURE, "400,60", ",60", 3, "could not convert"),
    (AZURE, "2031-01-01 18:15:47", "yesterday", 4, "Invalid isoformat"),
    (BURSTGPT, "15,Chat", "soon,Chat", 5, ""),
    (BURSTGPT, "15,Chat", "inf,Chat", 5, "inf is not a time"),
    (MOONCAKE, '"input_length": 10, ', "", 3, "no 'input_length'"),
    (MOONCAKE, '{"timestamp": 3001, "input_length": 10', "{oops", 3, "not a JSON object"),
    (FUNCTIONS, "0,2,0", "0,-2,0", 4, "a count is negative: -2"),
    (FUNCTIONS, "0,2,0", "0,x,0", 4, "invalid literal"),
    (OWN, "1.5,a", "-1.5,a", 3, "arrival_s -1.5 is negative"),
    (OWN, "1.5,a", "1.5,", 3, "model is empty"),
    (OWN, "1.5,a", "1.5,  ", 3, "model is empty"),
    (OWN, "30,40", "30,0", 3, "0 is not a number of tokens"),
    (OWN_JSON, '"b"', "7", 2, "model 7 is not text"),
    (OWN_JSON, '"b"', '["a"]', 2, "model ['a'] is not text"),
    (OWN_JSON, '"b"', "null", 2, "model None is not text"),
    (BURST_JSON, '"b"', "7", 2, "model 7 is not text"),
]


@pytest.mark.parametrize(("text", "good", "bad", "line", "reason"), BAD_ROWS)
def test_bad_rows_are_named_by_line_or_counted(write, text, good, bad, line, reason):
    assert good in text
    path = write(text.replace(good, bad, 1))
    with pytest.raises(InputError) as caught:
        read_trace([path])
    assert caught.value.message.startswith(f"{path}, line {line}: ")
    assert reason in caught.value.message
    assert "mmrl workload fit --skip-bad" in caught.value.remedy
    trace = read_trace([path], skip_bad=True)
    assert 0 < len(trace) < len(read_trace([write(text)]))
    assert any(f"skipped 1 bad rows of trace.csv (first: line {line}:" in n for n in trace.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        (AZURE.splitlines()[0] + "\n", "holds no requests"),
        ("time,tokens\n1,2\n", "no known trace format: its first line is 'time,tokens'"),
        (
            OWN.replace("model", "modle"),
            r"no 'model', which .* mmrl needs \(rename 'modle'",
        ),
        (OWN.replace("arrival_s", "arrival"), r"no 'arrival_s', .*\(rename 'arrival'"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,2\n", "no 'model', which format mmrl needs"),
        ("model,prompt_tokens,output_tokens\na,1,2\n", "records lengths and no arrival times"),
        ("num_prefill_tokens,num_decode_tokens\n1,2\n", "records lengths and no arrival times"),
        (FUNCTIONS.replace("10,0,5", "0,0,0").replace("2", "0").replace("queue,1", "q,0"), "0 inv"),
        ('# {"models": [1]}\n' + OWN, "line 1: models and notes"),
        ('# {"duration_s": "long"}\n' + OWN, "line 1: duration_s"),
        ('# {"duration_s": 1.0}\n' + OWN, "after the end"),
    ],
)
def test_files_that_are_no_trace(write, text, message):
    with pytest.raises(InputError, match=message):
        read_trace([write(text)])


def test_what_cannot_be_read(write, tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*missing\.csv: No such file"):
        read_trace([tmp_path / "missing.csv"])
    with pytest.raises(InputError, match="cannot read"):
        read_trace([tmp_path])
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="not a text file"):
        read_trace([binary])
    cut = write(AZURE, "cut.csv.gz")
    cut.write_bytes(cut.read_bytes()[:40])
    with pytest.raises(InputError, match="broken gzip file"):
        read_trace([cut])


def test_format_can_be_forced_and_must_suit(write):
    path = write(AZURE)
    assert len(read_trace([path], format="azure-llm")) == 3
    with pytest.raises(InputError, match="has no 'Timestamp', which format burstgpt needs"):
        read_trace([path], format="burstgpt")
    with pytest.raises(InputError, match="has no 'HashFunction'"):
        read_trace([path], format="azure-functions")
    with pytest.raises(InputError, match="did you mean 'azure-llm'"):
        read_trace([path], format="azure-lm")


def test_files_must_go_together(write):
    azure, own = write(AZURE, "a.csv"), write(OWN, "b.csv")
    with pytest.raises(InputError, match=r"is azure-llm, but .* is mmrl"):
        read_trace([azure, own])
    with pytest.raises(InputError, match="given twice"):
        read_trace([azure, azure])


def test_length_pairs_come_from_traces_and_length_files(write):
    assert read_length_pairs(write(AZURE)).tolist() == [[300, 40], [400, 60], [500, 50]]
    vidur = write("num_prefill_tokens,num_decode_tokens\n3000,70\n2000,80\n", "v.csv.gz")
    assert read_length_pairs(vidur).tolist() == [[3000, 70], [2000, 80]]
    with pytest.raises(InputError, match="records no lengths"):
        read_length_pairs(write(FUNCTIONS))
