"""The page's texts in English and Chinese, its style and its script."""

from pathlib import Path

SAYINGS = {  # labels and messages: English, Chinese
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
    "names_hint": ("One per line, or separated by commas. To show another name: shown=asked, as in 狗=dog",
                   "一行一个，或用逗号隔开。“显示=提问”可换名称：狗=dog"),
    "language": ("Language of the classes", "类别的语言"),
    "templates": ("Sentences, with {} for the class", "句子，用 {} 代表类别"),
    "classify": ("Classify", "分类"),
    "pictures": ("Pictures, up to {images}", "图片，最多 {images} 张"),
    "captions": ("Captions, one per line, up to {captions}", "描述，一行一条，最多 {captions} 条"),
    "captions_hint": ("a dog on a beach", "海边的狗"),
    "compare": ("Compare", "比较"),
    "limits": ("JPEG, PNG, WebP and others, up to {megabytes} MB each. They stay on the machine that runs this page"
               " and are deleted after about an hour.",
               "支持 JPEG、PNG、WebP 等，每张最大 {megabytes} MB。图片只在运行本页的机器上，约一小时后删除。"),
    "no_index": ("There is no index to search. Create one, then start this page with it:",
                 "还没有可搜索的索引。请先建立索引，再用它启动本页："),
    "about": ("{pictures} pictures in {index}; model: {model}", "{index}：{pictures} 张图片；模型：{model}"),
    "about_model": ("model: {model}", "模型：{model}"),
    "found": ("{n} of {pictures} pictures: {query}", "{pictures} 张中的 {n} 张：{query}"),
    "like": ("{n} of {pictures} pictures, similar to {name}", "{pictures} 张中的 {n} 张，与 {name} 相似"),
    "same": ("same content: {names}", "内容相同：{names}"),
    "score": ("The number is the cosine. It orders these pictures; it is not a probability.",
              "数字是余弦相似度，只用于排序，不是概率。"),
    "among": ("Probabilities among these {n} classes. One of them always wins, even if none fits.",
              "概率只在这 {n} 个类别之间分配：哪怕都不像，也总有一个最高。"),
    "cells": ("Each cell has the cosine and, below it, the probability of the caption among these, for that picture.",
              "每格上方是余弦相似度，下方是这条描述在该图片的所有描述中的概率。"),
    "heat_title": ("Cosines of pictures and captions", "图片与描述的余弦相似度"),
    "caption": ("Caption", "描述"),
    "unreadable": ("The model's text tower cannot read this: {names}. {tokens_per_character:.2f} tokens per character"
                   " (English words: 0.2 to 0.3), {unknown:.0%} of them unknown, {fragments:.0%} pieces of a character."
                   " Unless the model was trained on this language, results are random: ask in English. Classes can"
                   " have any name: 猫=cat.",
                   "模型的文本编码器读不懂：{names}。每个字 {tokens_per_character:.2f} 个词元（英文单词：0.2 到 0.3），"
                   "其中 {unknown:.0%} 未知，{fragments:.0%} 只是字的碎片。"
                   "除非模型用这种语言训练过，否则结果等于随机：请用英文提问，类别可写成：猫=cat。"),
    "identical": ("The text tower cannot tell these apart: {names}.", "对文本编码器来说，这些没有区别：{names}。"),
    "nothing": ("The query is empty: write what should be in the pictures, not only what should not.",
                "还没有输入要找的内容：请写出图片里要有什么，只写不要什么是不够的。"),
    "no_picture": ("There is no picture yet: choose one, or drop it into the box.", "还没有图片：请选择，或拖到框里。"),
    "deleted": ("{name} has been deleted by now: choose it again.", "{name} 已在这里删除：请重新选择。"),
    "too_many_pixels": ("{name} has {n:.0f} million pixels: at most {most}.",
                        "{name} 有 {n:.0f} 百万像素，最多 {most}。"),
    "too_much": ("This upload is too large: {most} MB at most.", "一次上传太多：合计最多 {most} MB。"),
    "no_room": ("The page's machine has no room for more uploads: try again in an hour.",
                "运行本页的机器暂时没有空间存放上传的图片：请一小时后再试。"),
    "refused": ("This page does not answer this request.", "本页不回答这个请求。"),
    "bad_k": ("Ask for 1 to {most} pictures.", "请选择显示 1 到 {most} 张图片。"),
    "no_classes": ("Name at least two classes, one per line or separated by commas.", "请至少写两个类别，一行一个。"),
    "twice": ("“{name}” is named twice: remove one.", "“{name}”出现了两次：请去掉一个。"),
    "half": ("“{name}”: write something on both sides of =.", "“{name}”：等号两边都要写。"),
    "no_braces": ("“{name}” must have exactly one {{}}, for the class.", "“{name}”里要有且只有一个 {{}} 代表类别。"),
    "no_sentences": ("Write at least one sentence with {{}} for the class.", "请至少写一个带 {{}} 的句子。"),
    "no_captions": ("Write at least one caption, one per line.", "请至少写一条描述，一行一条。"),
    "too_many": ("{n} are too many: {most} at most.", "{n} 个太多了：最多 {most} 个。"),
    "too_large": ("{name} has {n:.1f} MB: at most {most:g} MB each.", "{name} 有 {n:.1f} MB，最大 {most:g} MB。"),
    "too_long": ("This text is too long: {most} characters at most.", "文字太长：最多 {most} 个字符。"),
    "broken": ("This picture cannot be used. {why}", "这张图片无法使用。{why}"),
    "gone": ("The picture cannot be shown.", "图片无法显示。"),
    "fault": ("Something went wrong; the details are in the page's terminal. You can continue.",
              "程序出错了，详情见运行本页的终端。可以继续使用。"),
}  # fmt: skip
LANGUAGES = {"en": "English", "zh": "中文", "fr": "Français", "es": "Español"}  # each in its own language


class Words:
    """The page's texts in one language: `say("k")`. It is Chinese if that is the browser's first language, else
    English."""

    def __init__(self, accepted: str = ""):
        self.language = "zh" if accepted.strip().lower().startswith("zh") else "en"

    def __call__(self, saying: str, **values) -> str:
        return SAYINGS[saying][self.language == "zh"].format(**values)


CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
# The arrow keys switch tabs; Gradio itself handles Tab, Enter and the space bar.
SCRIPT = """() => document.addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key], tab = event.target.closest("[role=tab]");
  if (!step || !tab) return;
  const tabs = [...tab.parentElement.querySelectorAll("[role=tab]")];
  const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
  next.focus(); next.click(); event.preventDefault();
})"""
