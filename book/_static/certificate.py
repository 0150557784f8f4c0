"""Draws certificate.svg, the picture on the front page: discs of certified radius and an attack just outside each."""

import math
from pathlib import Path

POINTS = [(95, 115, 0), (240, 95, 0), (400, 85, 0), (165, 245, 1), (330, 235, 1), (500, 250, 1)]
COLOURS = ["#CC79A7", "#009E73"]


def boundary(x: float) -> float:
    return 170 + 25 * math.sin(x / 75)


def nearest(x: float, y: float) -> tuple[float, float]:
    return min(((u, boundary(u)) for u in range(0, 600)), key=lambda p: math.dist(p, (x, y)))


def main() -> None:
    curve = " ".join(f"{x},{boundary(x):.1f}" for x in range(0, 601, 4))
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 330" role="img" aria-label="certified discs">',
        '<rect width="600" height="330" fill="#D3EBE2"/>',
        f'<polygon points="0,0 {curve} 600,0" fill="#F5E1EC"/>',
        f'<polyline points="{curve}" fill="none" stroke="#333" stroke-width="2"/>',
    ]
    for x, y, label in POINTS:
        u, v = nearest(x, y)
        radius = 0.97 * math.dist((x, y), (u, v))
        parts += [
            f'<circle cx="{x}" cy="{y}" r="{radius:.1f}" fill="none" stroke="#111" stroke-width="2"/>',
            f'<line x1="{x}" y1="{y}" x2="{u:.1f}" y2="{v:.1f}" stroke="#111" stroke-dasharray="4 4"/>',
            f'<circle cx="{x}" cy="{y}" r="6" fill="{COLOURS[label]}" stroke="#111"/>',
            f'<path d="M{u - 7:.1f} {v - 7:.1f} l14 14 m0 -14 l-14 14" stroke="#D55E00" stroke-width="4"/>',
        ]
    parts.append("</svg>\n")
    Path(__file__).with_suffix(".svg").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
