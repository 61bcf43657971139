"""The report's page: Jinja2 markup and its style sheet. All that enters is escaped; it loads nothing."""

STYLE = """
:root {
  color-scheme: light dark; --ink: #1c2330; --soft: #667085; --line: #e4e7ec; --card: #fff; --page: #f6f7f9;
  --accent: #3b82f6; --right: #067647; --right-bg: #dcfae6; --near: #93580a; --near-bg: #fef0c7;
  --wrong: #b42318; --wrong-bg: #fee4e2;
}
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6e9ef; --soft: #98a2b3; --line: #2c3442; --card: #171c26; --page: #0e1219;
  --right: #75e0a7; --right-bg: #0f3d2a; --near: #fec84b; --near-bg: #4a3208;
  --wrong: #fda29b; --wrong-bg: #55160c;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { margin: 0; font-size: 30px; letter-spacing: -.02em; }
h2 { margin: 48px 0 14px; font-size: 20px; letter-spacing: -.01em; }
h3 { margin: 24px 0 10px; font-size: 15px; }
.soft { color: var(--soft); }
.small { font-size: 13px; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 6px; color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.scroll { overflow-x: auto; }

.tiles { display: grid; gap: 14px; margin-top: 26px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }
.tile { padding: 16px 18px; color: var(--soft); }
.tile b { display: block; color: var(--ink); font-size: 34px; line-height: 1.2; letter-spacing: -.02em; }

table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 14px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-size: 12.5px; font-weight: 600; color: var(--soft); }
tbody tr:last-child > * { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; }
td:first-child { font-weight: 600; }
th.over { text-align: center; }
.group { border-left: 1px solid var(--line); }
.bar { display: block; height: 4px; margin-top: 4px; border-radius: 2px; background: var(--line); }
.bar i { display: block; height: 100%; border-radius: 2px; background: var(--accent); }
.breakdowns { display: grid; gap: 14px; align-items: start; }
.breakdowns { grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); }
.breakdowns th, .breakdowns td { padding: 6px 14px; }

.curves { padding: 14px; }
.curves svg { width: 100%; min-width: 820px; height: auto; display: block; }

.pages { columns: 2; column-gap: 14px; }
.page { display: grid; grid-template-columns: 256px 1fr; gap: 16px; padding: 14px; margin-bottom: 14px; }
.page { align-items: start; break-inside: avoid; }
.page img, .missing { width: 256px; border: 1px solid var(--line); border-radius: 6px; background: #fff; }
.page img.enlarged { image-rendering: pixelated; }
.missing { padding: 60px 12px; text-align: center; color: #667085; font-size: 13px; }
.page header { display: flex; justify-content: space-between; gap: 12px; }
.page header { font-size: 12.5px; color: var(--soft); }
.page p { margin: 10px 0 2px; font-weight: 600; line-height: 1.35; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 10px; margin: 0; font-size: 13.5px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.said { padding: 1px 6px; border-radius: 5px; }
.said { box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.said u { text-decoration-thickness: 2px; }
.right { color: var(--right); background: var(--right-bg); }
.near { color: var(--near); background: var(--near-bg); }
.wrong { color: var(--wrong); background: var(--wrong-bg); }

pre { margin: 0; padding: 4px 18px 16px; overflow-x: auto; font: 13px/1.45 ui-monospace, monospace; }
summary { cursor: pointer; padding: 12px 18px; font-weight: 600; }
@media (max-width: 900px) { .pages { columns: 1; } }
@media (max-width: 520px) { .page { grid-template-columns: 1fr; } }
"""

TEMPLATE = """
{%- macro score(value) -%}
{{ "%.3f" | format(value) }}
<span class="bar"><i style="width: {{ "%.1f" | format(100 * value) }}%"></i></span>
{%- endmacro -%}
{%- macro missing() -%}<span class="soft">(nothing)</span>{%- endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ name }}</h1>
<div class="facts">{% for fact in facts %}<span>{{ fact }}</span>{% endfor %}</div>

{% set first, scores = benchmarks.items() | first %}
<div class="tiles">
<div class="card tile"><b>{{ "%.3f" | format(scores.anls) }}</b>ANLS on {{ first }}</div>
<div class="card tile"><b>{{ "%.3f" | format(scores.exact_match) }}</b>exact match</div>
<div class="card tile"><b>{{ "%.3f" | format(scores.image_blanked.anls) }}</b>ANLS with the page blanked</div>
<div class="card tile"><b>{{ scores.examples }}</b>questions on {{ page_counts[first] }} pages</div>
</div>

<h2>Scores</h2>
<div class="card scroll"><table>
<thead>
<tr><th colspan="2"></th><th class="group over" colspan="{{ metrics | length }}">reading the page</th>
<th class="group over" colspan="2">page blanked</th></tr>
<tr><th>benchmark</th><th>questions</th>
{% for metric in metrics.values() %}
<th{% if loop.first %} class="group"{% endif %}>{{ metric.title }}</th>
{% endfor %}
<th class="group">{{ metrics.anls.title }}</th><th>{{ metrics.exact_match.title }}</th></tr>
</thead>
<tbody>
{% for benchmark, of in benchmarks.items() %}
<tr><td>{{ benchmark }}</td><td>{{ of.examples }}</td>
{% for key, metric in metrics.items() %}
<td{% if loop.first %} class="group"{% endif %}>
{%- if metric.higher_is_better %}{{ score(of[key]) }}{% else %}{{ "%.3f" | format(of[key]) }}{% endif -%}
</td>
{% endfor %}
<td class="group">{{ score(of.image_blanked.anls) }}</td>
<td>{{ score(of.image_blanked.exact_match) }}</td></tr>
{% endfor %}
</tbody>
</table></div>
<p class="soft small">Page blanked: the same questions about an empty page; what is right there was guessed.
{{ metrics.character_error_rate.title }}: character error rate, lower is better.</p>

{% for benchmark, groups in breakdowns.items() if groups %}
<h3>{{ benchmark }} by {{ groups | join(", ") }}</h3>
<div class="breakdowns">
{% for group, values in groups.items() %}
<div class="card scroll"><table>
<thead><tr><th>{{ group }}</th><th>questions</th><th>{{ metrics.anls.title }}</th>
<th>{{ metrics.exact_match.title }}</th></tr></thead>
<tbody>
{% for value, part in values.items() %}
<tr><td>{{ value }}</td><td>{{ part.examples }}</td><td>{{ score(part.anls) }}</td>
<td>{{ score(part.exact_match) }}</td></tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
</div>
{% endfor %}

{% if curves %}
<h2>Training</h2>
<div class="card curves scroll">{{ curves }}</div>
{% endif %}

<h2>Pages</h2>
<p class="soft small"><span class="said right">right</span> matches the answer but for case and spaces,
<span class="said near">near</span> has at least half of it right,
<span class="said wrong">wrong</span> has less. In a near answer, what
differs is underlined.</p>
{% for benchmark, picks in pages.items() %}
{% for title, cards in picks.items() %}
<h3>{{ benchmark }}: {{ title }}</h3>
<div class="pages">
{% for card in cards %}
<article class="card page">
{% if card.image %}
<img src="{{ card.image }}" alt="page {{ card.page }}"{% if card.enlarged %} class="enlarged"{% endif %}>
{% else %}
<div class="missing">the page's image is no longer there</div>
{% endif %}
<div>
<header><span>{{ card.page }}</span>
<span>{{ metrics.anls.title }} {{ "%.2f" | format(card.anls) }}</span></header>
{% for asked in card.asked %}
<p>{{ asked.question }}</p>
<dl>
<dt>answer</dt><dd>{{ asked.answers | join(" | ") }}</dd>
<dt>model</dt><dd><span class="said {{ asked.verdict }}" title="{{ asked.verdict }}">
{%- for text, same in asked.said -%}
{% if same %}{{ text }}{% else %}<u>{{ text }}</u>{% endif %}
{%- else %}{{ missing() }}{% endfor -%}
</span></dd>
<dt>blanked</dt><dd class="soft">{{ asked.blanked or missing() }}</dd>
</dl>
{% endfor %}
</div>
</article>
{% endfor %}
</div>
{% endfor %}
{% endfor %}

{% if config %}
<h2>Config</h2>
<details class="card"><summary>the resolved config of the run</summary><pre>{{ config }}</pre></details>
{% endif %}
</main>
</body>
</html>
"""
