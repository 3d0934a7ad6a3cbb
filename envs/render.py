"""Pictures of a node: a table of the present for terminals, a timeline of the episode as an image.

In the image each model has a lane. The filled step is the share of its weights on the device (dark)
and wanted (light); the line below is its queue, the ticks are decisions on it.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gymnasium.error import DependencyNotInstalled

from mmrl.envs.timeline import Timeline
from mmrl.node.memory import free_bytes
from mmrl.node.state import DECODE_STEP, IDLE, LINK_IDLE
from mmrl.sim.batch import Simulator

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

BAR = 12

WIDTH, LANE, TOP, BOTTOM, LEFT, RIGHT = 1200, 84, 46, 34, 196, 20
BACKGROUND, INK, FAINT, GRID = "#ffffff", "#1f2933", "#7b8794", "#e4e7eb"
HELD, WANTED, QUEUE, KV_MOVE = "#3e7cb1", "#cfe0ee", "#d1495b", "#8f6bb3"
VERB_COLOURS = {"out": "#c2410c", "pause": "#b08900", "resume": "#2a9d5c", "focus": "#6b4fa0"}
LOAD_COLOUR = "#17527f"
SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600, 7200, 14400)


def table(simulator: Simulator, decision: str, i: int = 0) -> str:
    """Return a node as a table: a line for the device, a line for each model.

    Args:
        simulator: Holds the node.
        decision: Name of the last action.
        i: Which node.
    """
    s, names = simulator.nodes[i], simulator.infos[i].model_names
    gpu = "idle" if s.gpu_kind == IDLE else ("decode" if s.gpu_kind == DECODE_STEP else "prefill")
    if s.gpu_kind != IDLE:
        gpu += f" {names[s.gpu_model]}"
    link = "idle"
    if s.h2d_kind != LINK_IDLE:
        link = f"{('', 'restore', 'stream', 'load')[s.h2d_kind]} {names[s.h2d_model]}"
    budget_gb = s.budget_bytes / 1e9
    width = max(5, *(len(name) for name in names))
    lines = [
        f"{s.now_ns * 1e-9:.3f} s   free {free_bytes(s) / 1e9:.1f} of {budget_gb:.1f} GB   "
        f"device: {gpu}   link: {link}   last decision: {decision}",
        f"{'model':<{width}}  {'on the device':<{BAR + 7}}  queue  run  susp  {'KV GB':>6}  state",
    ]
    for m, name in enumerate(names):
        landed, target = s.landed[m] / s.pieces[m], s.target[m] / s.pieces[m]
        full, wanted = round(BAR * landed), round(BAR * max(landed, target))
        bar = "#" * full + "-" * (wanted - full) + " " * (BAR - wanted)
        running = s.decoding[m] + (s.prefilling[m] >= 0)
        kv_gb = s.kv_blocks[m] * s.block_bytes[m] / 1e9
        lines.append(
            f"{name:<{width}}  [{bar}] {landed:>4.0%}  {s.queue_len[m]:>5}  {running:>3}  "
            f"{s.begun_len[m] - running:>4}  {kv_gb:>6.2f}  {_state(s, m)}"
        )
    return "\n".join(lines)


def _state(s: Any, m: int) -> str:
    if s.paused[m]:
        return "paused"
    if s.target[m] == 0:
        return "leaving" if s.granted[m] else ("wanted" if s.queue_len[m] else "out")
    if s.granted[m] < s.target[m]:
        return "waits for memory"
    return "loading" if s.landed[m] < s.target[m] else "resident"


def picture(timeline: Timeline) -> npt.NDArray[np.uint8]:
    """Draw a timeline, uint8[height, width, 3].

    Raises:
        DependencyNotInstalled: Pillow is missing.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise DependencyNotInstalled("Pillow draws rgb_array: pip install pillow") from error

    height = TOP + LANE * len(timeline.model_names) + BOTTOM
    image = Image.new("RGB", (WIDTH, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(13)
    x = LEFT + (WIDTH - LEFT - RIGHT) * timeline.time_s / timeline.horizon_s
    _draw_axis(draw, timeline, height)
    for m, name in enumerate(timeline.model_names):
        top = TOP + LANE * m
        draw.text((10, top + 12), name, fill=INK)
        draw.text((10, top + 31), _now(timeline, m), fill=FAINT)
        _draw_residency(draw, timeline, m, x, top)
        _draw_queue(draw, timeline, m, x, top)
        _draw_decisions(draw, timeline, m, x, top)
    _draw_legend(draw, timeline)
    return np.asarray(image).copy()


def _now(timeline: Timeline, m: int) -> str:
    parts = [f"{timeline.queued[-1, m]} queued", f"{timeline.running[-1, m]} running"]
    if timeline.suspended[-1, m]:
        parts[1:] = [f"{timeline.running[-1, m]} run", f"{timeline.suspended[-1, m]} susp"]
    return ", ".join(parts)


def _draw_axis(draw: "ImageDraw", timeline: Timeline, height: int) -> None:
    step = next((s for s in SECONDS if timeline.horizon_s / s <= 12), SECONDS[-1])
    for second in range(0, int(timeline.horizon_s) + 1, step):
        x = LEFT + (WIDTH - LEFT - RIGHT) * second / timeline.horizon_s
        draw.line((x, TOP, x, height - BOTTOM), fill=GRID)
        draw.text((x, height - BOTTOM + 8), f"{second} s", fill=FAINT, anchor="ma")
    for m in range(len(timeline.model_names) + 1):
        draw.line((10, TOP + LANE * m, WIDTH - RIGHT, TOP + LANE * m), fill=GRID)


def _draw_residency(
    draw: "ImageDraw", timeline: Timeline, m: int, x: npt.NDArray[np.float64], top: int
) -> None:
    """Fill the upper part of a lane up to the share of weights wanted, and held."""
    low, size = top + 48, 40
    wanted = np.maximum(timeline.target[:, m], timeline.landed[:, m])
    for values, colour in ((wanted, WANTED), (timeline.landed[:, m], HELD)):
        for k in np.flatnonzero(values[:-1]):
            high = low - size * values[k]
            draw.rectangle((x[k], high, max(x[k], x[k + 1]), low), fill=colour)
    moving = timeline.saving[:, m] | timeline.restoring[:, m]
    for k in np.flatnonzero(moving[:-1]):
        draw.rectangle((x[k], low + 1, max(x[k] + 1, x[k + 1]), low + 3), fill=KV_MOVE)


def _draw_queue(
    draw: "ImageDraw", timeline: Timeline, m: int, x: npt.NDArray[np.float64], top: int
) -> None:
    """Draw the queue as steps in the lower part of a lane, all lanes to one scale."""
    low, size = top + LANE - 5, 24
    scale = max(8, int(timeline.queued.max(initial=0)))
    y = low - size * timeline.queued[:, m] / scale
    points = [(float(x[0]), float(y[0]))]
    for k in range(1, len(x)):
        points += [(float(x[k]), float(y[k - 1])), (float(x[k]), float(y[k]))]
    if len(points) > 1:
        draw.line(points, fill=QUEUE)


def _draw_decisions(
    draw: "ImageDraw", timeline: Timeline, m: int, x: npt.NDArray[np.float64], top: int
) -> None:
    for k, action in enumerate(timeline.action):
        if action <= 0 or action >= len(timeline.action_names):
            continue
        model, verb = timeline.action_names[action].split(".")
        if model == f"model{m}":
            colour = VERB_COLOURS.get(verb, LOAD_COLOUR)
            draw.polygon([(x[k] - 4, top + 2), (x[k] + 4, top + 2), (x[k], top + 8)], fill=colour)


def _draw_legend(draw: "ImageDraw", timeline: Timeline) -> None:
    taken = timeline.action[timeline.action > 0]
    title = f"{timeline.time_s[-1]:.1f} s, {len(taken)} verbs, {timeline.budget_gb:.0f} GB"
    draw.text((10, 14), title, fill=INK)
    x = float(LEFT)
    boxes = (("weights on the device", HELD), ("wanted", WANTED), ("KV moves", KV_MOVE))
    lines = (("queue", QUEUE),)
    marks = (("load", LOAD_COLOUR), *VERB_COLOURS.items())
    for name, colour in boxes:
        draw.rectangle((x, 17, x + 12, 28), fill=colour)
        x = _label(draw, x + 18, name)
    for name, colour in lines:
        draw.line((x, 23, x + 14, 23), fill=colour, width=2)
        x = _label(draw, x + 20, name)
    for name, colour in marks:
        draw.polygon([(x, 18), (x + 10, 18), (x + 5, 27)], fill=colour)
        x = _label(draw, x + 16, name)


def _label(draw: "ImageDraw", x: float, text: str) -> float:
    draw.text((x, 14), text, fill=INK)
    return x + float(draw.textlength(text)) + 18
