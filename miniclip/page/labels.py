"""What does the page say, in English and Chinese, and what does it look like?"""

SAYINGS = {  # what stands in the page from the beginning, and what it answers: English, Chinese
    "title": ("Ask your pictures", "问问你的图片"),
    "words": ("By words", "文字搜图"),
    "picture": ("By picture", "以图搜图"),
    "classes": ("What is it?", "图片分类"),
    "heat": ("Heat map", "相似度图"),
    "query": ("What should be in the pictures?", "图片里要有什么？"),
    "query_hint": ("a dog on a beach", "海边的狗"),
    "minus": ("Not wanted", "不要什么"),
    "minus_hint": ("people, snow", "人，雪"),
    "k": ("How many", "显示几张"),
    "search": ("Search", "搜索"),
    "upload": ("Your picture", "你的图片"),
    "beside": ("Words beside it (optional)", "附加文字（可不填）"),
    "beside_hint": ("in the snow", "在雪地里"),
    "names": ("Classes", "类别"),
    "names_hint": ("One a line, or commas between. shown=asked gives another name: 狗=dog",
                   "一行一个，或用逗号隔开。“显示=提问”可换名称：狗=dog"),
    "language": ("Language of the classes", "类别的语言"),
    "templates": ("Sentences, with {} for the class", "句子，用 {} 代表类别"),
    "classify": ("Classify", "分类"),
    "pictures": ("Pictures, up to {images}", "图片，最多 {images} 张"),
    "captions": ("Captions, one a line, up to {captions}", "描述，一行一条，最多 {captions} 条"),
    "captions_hint": ("a dog on a beach", "海边的狗"),
    "compare": ("Compare", "比较"),
    "limits": ("JPEG, PNG, WebP and others, up to {megabytes} MB each. They stay on the machine that runs this page,"
               " and are deleted there after an hour or so.",
               "支持 JPEG、PNG、WebP 等，每张最大 {megabytes} MB。图片只在运行本页的机器上，约一小时后删除。"),
    "no_index": ("There is no index to search in. Make one, then start this page with it:",
                 "还没有可搜索的索引。请先建立索引，再用它启动本页："),
    "about": ("{pictures} pictures in {index}, seen by {model}", "{index}：{pictures} 张图片；模型：{model}"),
    "about_model": ("model: {model}", "模型：{model}"),
    "found": ("{n} of {pictures} pictures: {query}", "{pictures} 张中的 {n} 张：{query}"),
    "like": ("{n} of {pictures} pictures, like {name}", "{pictures} 张中的 {n} 张，与 {name} 相似"),
    "same": ("the same: {names}", "内容相同：{names}"),
    "score": ("The number is the cosine: it orders these pictures and is no probability.",
              "数字是余弦相似度，只用于排序，不是概率。"),
    "among": ("Probabilities among these {n} classes: one of them always wins, however far it is.",
              "概率只在这 {n} 个类别之间分配：哪怕都不像，也总有一个最高。"),
    "cells": ("In each cell the cosine and, below it, the caption's probability among these captions for that picture.",
              "每格上方是余弦相似度，下方是这条描述在该图片的所有描述中的概率。"),
    "heat_title": ("Cosines of pictures and captions", "图片与描述的余弦相似度"),
    "caption": ("Caption", "描述"),
    "illegible": ("The model's text tower cannot read this: {names}. {tokens_per_character:.2f} tokens a character"
                  " (English words: 0.2 to 0.3), {unknown:.0%} of them unknown, {fragments:.0%} pieces of a character."
                  " Unless it was trained on this language, the answer is chance: ask in English, and name classes as"
                  " you like: 猫=cat.",
                  "模型的文本编码器读不懂：{names}。每个字 {tokens_per_character:.2f} 个词元（英文单词：0.2 到 0.3），"
                  "其中 {unknown:.0%} 未知，{fragments:.0%} 只是字的碎片。"
                  "除非模型用这种语言训练过，否则结果等于随机：请用英文提问，类别可写成：猫=cat。"),
    "alike": ("To the model's text tower these are the same: {names}.", "对文本编码器来说，这些没有区别：{names}。"),
    "nothing": ("Nothing is asked for: write what should be in the pictures. What is not wanted is not enough.",
                "还没有输入要找的内容：请写出图片里要有什么，只写不要什么是不够的。"),
    "no_picture": ("There is no picture yet: choose one, or drop it in the box.", "还没有图片：请选择，或拖到框里。"),
    "deleted": ("{name} has been deleted here meanwhile: choose it again.", "{name} 已在这里删除：请重新选择。"),
    "too_many_pixels": ("{name} has {n:.0f} million pixels: at most {most}.",
                        "{name} 有 {n:.0f} 百万像素，最多 {most}。"),
    "too_much": ("These are too many megabytes at once: at most {most}.", "一次上传太多：合计最多 {most} MB。"),
    "no_room": ("There is no room for more uploads on the page's machine now: try again in an hour.",
                "运行本页的机器暂时没有空间存放上传的图片：请一小时后再试。"),
    "refused": ("This page does not answer that.", "本页不回答这个请求。"),
    "bad_k": ("Ask for 1 to {most} pictures.", "请选择显示 1 到 {most} 张图片。"),
    "no_classes": ("Name at least two classes, one a line or commas between.", "请至少写两个类别，一行一个。"),
    "twice": ("“{name}” is named twice: leave one out.", "“{name}”出现了两次：请去掉一个。"),
    "half": ("“{name}”: on either side of = stands something.", "“{name}”：等号两边都要写。"),
    "no_braces": ("“{name}” is no sentence with one {{}} for the class.", "“{name}”里要有且只有一个 {{}} 代表类别。"),
    "no_sentences": ("Write at least one sentence with {{}} for the class.", "请至少写一个带 {{}} 的句子。"),
    "no_captions": ("Write at least one caption, one a line.", "请至少写一条描述，一行一条。"),
    "too_many": ("{n} are too many: {most} at most.", "{n} 个太多了：最多 {most} 个。"),
    "too_large": ("{name} has {n:.1f} MB: at most {most:g} MB a picture.", "{name} 有 {n:.1f} MB，最大 {most:g} MB。"),
    "too_long": ("This text is too long: {most} characters at most.", "文字太长：最多 {most} 个字符。"),
    "broken": ("This picture cannot be used. {why}", "这张图片无法使用。{why}"),
    "gone": ("The picture cannot be shown.", "图片无法显示。"),
    "fault": ("Something went wrong here; the page's terminal says what. You can go on.",
              "程序出错了，详情见运行本页的终端。可以继续使用。"),
}  # fmt: skip
LANGUAGES = {"en": "English", "zh": "中文", "fr": "Français", "es": "Español"}  # each in itself


class Words:
    """What the page says, in one language: `say("k")`. The language is the first that a browser names, Chinese or else
    English."""

    def __init__(self, accepted: str = ""):
        self.language = "zh" if accepted.strip().lower().startswith("zh") else "en"

    def __call__(self, saying: str, **values) -> str:
        return SAYINGS[saying][self.language == "zh"].format(**values)


CSS = """
.gradio-container { width: 100%; max-width: 1120px !important; margin: 0 auto !important;
  padding: clamp(12px, 3vw, 28px) clamp(12px, 3vw, 20px) 40px !important; }
.gradio-container > .main { padding: 0 !important; max-width: none !important; }
.gradio-container.gradio-container.gradio-container :focus-visible { outline-offset: 2px;
  outline: 3px solid var(--mc-accent) !important; }
:root { --mc-accent: #3450b4; --mc-cell: #f3f4f6; --mc-grey: #5b6370; --mc-heat: 63, 101, 214; --mc-bad: #a3231d;
  --mc-bad-cell: #fdecea; }
.dark { --mc-accent: #9db0ff; --mc-cell: #262a33; --mc-grey: #a9b1bd; --mc-heat: 96, 128, 240; --mc-bad: #ffb4ab;
  --mc-bad-cell: #45201d; }
.mc-head .html-container, .mc-answer .html-container { padding: 0 !important; }
.gradio-container button[role=tab][aria-selected=true] { color: var(--mc-accent); }
.mc-head h1 { font-size: 26px; font-weight: 650; margin: 0 !important; }
.mc-head p, .mc-note, .mc-cards small, .mc-limits p { color: var(--mc-grey) !important; font-size: 13px;
  margin: 2px 0 0 !important; }
.mc-answer { overflow-wrap: anywhere; }
.mc-answer h2 { font-size: 16px; font-weight: 600; margin: 4px 0 12px; }
.mc-answer p { margin: 6px 0 0; }
.mc-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 14px; margin: 0;
  padding: 0 !important; }
.mc-cards li { list-style: none; background: var(--mc-cell); border-radius: 8px; padding: 10px; margin: 0; }
.mc-cards img, .mc-gone { width: 100%; height: 150px; object-fit: contain; margin: 0; }
.mc-cards li > div { font-size: 14px; margin-top: 6px; }
.mc-cards b { display: inline; margin-right: 4px; }
.mc-cards small { display: block; font-variant-numeric: tabular-nums; }
.mc-gone { display: grid; place-items: center; text-align: center; color: var(--mc-grey); font-size: 13px; }
.mc-asked { display: flex; gap: 12px; align-items: center; margin-bottom: 14px; }
.mc-asked img { width: 96px; height: 96px; object-fit: contain; background: var(--mc-cell); border-radius: 8px; }
.mc-asked.mc-large img { width: min(100%, 320px); height: auto; max-height: 320px; }
.mc-note { max-width: 70ch; margin-top: 12px !important; }
.mc-warning, .mc-problem { max-width: 80ch; border-radius: 8px; padding: 10px 14px; margin: 0 0 14px !important; }
.mc-warning { border-left: 4px solid #b97700; background: var(--mc-cell); }
.mc-problem { border-left: 4px solid var(--mc-bad); background: var(--mc-bad-cell); color: var(--mc-bad);
  font-weight: 550; }
.mc-bars { padding: 0 !important; margin: 0; }
.mc-bars li { display: grid; grid-template-columns: minmax(80px, 160px) 1fr 56px; gap: 10px; align-items: center;
  list-style: none; margin: 0 0 6px; }
.mc-bar { background: var(--mc-cell); border-radius: 4px; height: 18px; overflow: hidden; }
.mc-bar i { display: block; height: 100%; min-width: 1px; background: var(--mc-accent); }
.mc-share { text-align: right; font-variant-numeric: tabular-nums; }
.mc-scroll { overflow-x: auto; max-width: 100%; }
.mc-heat { border: 0 !important; border-collapse: separate !important; margin: 0 !important; border-spacing: 3px;
  width: auto !important; }
.mc-heat caption { text-align: left; font-weight: 600; padding: 0 0 8px 3px; }
.mc-heat th, .mc-heat td { border: 0 !important; font-weight: 400; text-align: center; padding: 6px 8px !important; }
.mc-heat thead td, .mc-heat tbody th { text-align: left; min-width: 110px; max-width: 260px; }
.mc-heat thead td { color: var(--mc-grey); vertical-align: bottom; }
.mc-heat thead th { width: 108px; font-size: 12px; vertical-align: bottom; color: var(--mc-grey); }
.mc-heat thead th img, .mc-heat .mc-gone { width: 92px; height: 72px; object-fit: contain; margin: 0 auto 4px; }
.mc-heat thead span { display: block; max-width: 108px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.mc-heat tbody td { background: rgba(var(--mc-heat), calc(0.06 + 0.5 * var(--heat))); border-radius: 5px;
  font-variant-numeric: tabular-nums; min-width: 76px; }
.mc-heat small { display: block; opacity: 0.85; }
.mc-code { background: var(--mc-cell); border-radius: 8px; padding: 12px 14px; overflow-x: auto; font-size: 13px; }
.mc-file .download, .mc-file [data-testid=status-tracker] { display: none !important; }
footer { display: none !important; }
@media (max-width: 640px) {
  .tab-container button { padding: 0 6px; font-size: 13px; }
  .mc-cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
  .mc-cards img, .mc-gone { height: 120px; }
  .mc-asked.mc-large img { max-width: 200px; }
  .mc-bars li { grid-template-columns: minmax(70px, 30%) 1fr 52px; }
}
@media (max-width: 339px) { .tab-container button { padding: 0 3px; font-size: 12px; } }
"""
# The arrow keys go from tab to tab; Tab, Enter and the space bar are Gradio's.
SCRIPT = """() => document.addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key], tab = event.target.closest("[role=tab]");
  if (!step || !tab) return;
  const tabs = [...tab.parentElement.querySelectorAll("[role=tab]")];
  const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
  next.focus(); next.click(); event.preventDefault();
})"""
