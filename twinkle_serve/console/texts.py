"""Every word of the console, in English and Chinese.

Knows words. Does not know where they stand.
"""

from __future__ import annotations

from collections.abc import Callable

LANGUAGES = {"en": "English", "zh": "中文"}

# key: (English, Chinese). ``{name}`` is filled in.
TEXTS: dict[str, tuple[str, str]] = {
    "skip": ("Skip to content", "跳到正文"),
    "menu": ("Main menu", "主菜单"),
    "runs": ("Runs", "训练任务"),
    "checkpoints": ("Checkpoints", "检查点"),
    "playground": ("Playground", "对话试用"),
    "cluster": ("Cluster", "集群"),
    "sign_in": ("Sign in", "登录"),
    "sign_out": ("Sign out", "退出登录"),
    "signed_in_as": ("signed in as {name}", "已登录：{name}"),
    "api_key": ("API key", "API 密钥"),
    "api_key_hint": (
        "The key that your programs use. It is kept encrypted in a cookie of this browser.",
        "与程序使用的密钥相同，仅以加密形式保存在本浏览器的 Cookie 中。",
    ),
    "wrong_key": ("This key is not accepted here.", "此密钥无效。"),
    "no_key": ("Enter an API key.", "请输入 API 密钥。"),
    "error": ("That did not work", "操作未成功"),
    "not_found": ("There is no such thing here, or it is not yours.", "不存在，或不属于您。"),
    "away": (
        "The service is starting or recovering. This page tries again by itself.",
        "服务正在启动或恢复，本页会自动重试。",
    ),
    "foreign_form": ("This form came from another site and was ignored.", "该表单来自其他网站，已忽略。"),
    "no_runs": (
        "No training runs yet. Start one with the SDK; it appears here at once.",
        "还没有训练任务。用 SDK 创建后会立即显示在这里。",
    ),
    "run": ("Run", "任务"),
    "base_model": ("Base model", "基础模型"),
    "rank": ("LoRA rank", "LoRA 秩"),
    "state": ("State", "状态"),
    "steps": ("Steps", "步数"),
    "loss": ("Loss", "损失"),
    "tokens": ("Tokens", "词元"),
    "last_request": ("Last request", "最近请求"),
    "newer": ("Newer", "较新"),
    "older": ("Older", "较早"),
    "page_of": ("{first}–{last} of {total}", "第 {first}–{last} 项，共 {total} 项"),
    "state_idle": ("idle", "空闲"),
    "state_working": ("training", "训练中"),
    "state_waiting": ("waiting", "排队中"),
    "state_gap": ("waiting for request {missing}", "等待第 {missing} 号请求"),
    "state_paged": ("paged out", "已换出"),
    "state_asleep": ("asleep", "休眠"),
    "state_unloaded": ("unloaded", "已卸载"),
    "state_corrupted": ("damaged", "已损坏"),
    "state_not_served": ("base model not loaded", "基础模型未加载"),
    "position": ("position {position}", "排在第 {position} 位"),
    "position_seconds": ("position {position}, ~{seconds} s", "排在第 {position} 位，约 {seconds} 秒"),
    "requests_waiting": ("{count} requests waiting", "{count} 个请求等待中"),
    "curves": ("Curves", "曲线"),
    "curves_hint": (
        "By optimizer step. Loss is the mean over the tokens that count, as the server computed it.",
        "按优化步绘制。损失为服务器计算的有效词元平均值。",
    ),
    "no_steps": (
        "Nothing to draw yet: curves begin with the first optimizer step.",
        "暂无曲线：完成第一个优化步后开始绘制。",
    ),
    "needs_javascript": ("Curves need JavaScript.", "曲线需要启用 JavaScript。"),
    "report_hint": (
        "Draw your own numbers (a reward, an evaluation) here: POST {url}",
        "也可绘制自己的指标（奖励、评测等）：POST {url}",
    ),
    "curve_loss": ("Loss", "损失"),
    "curve_forward_loss": ("Loss of forward passes", "前向损失"),
    "curve_reward": ("Reward", "奖励"),
    "curve_learning_rate": ("Learning rate", "学习率"),
    "curve_tokens": ("Tokens a step", "每步词元"),
    "curve_grad_norm": ("Gradient norm", "梯度范数"),
    "curve_kl_sampled_trained": ("KL (sampled, trained)", "KL（采样，训练）"),
    "curve_clipped_tokens": ("Share of clipped tokens", "被裁剪词元占比"),
    "no_checkpoints": ("No checkpoints yet.", "还没有检查点。"),
    "name": ("Name", "名称"),
    "kind": ("Kind", "类型"),
    "kind_training": ("training state", "训练状态"),
    "kind_sampler": ("weights for sampling", "采样权重"),
    "kind_external": ("export", "导出"),
    "size": ("Size", "大小"),
    "created": ("Created", "创建时间"),
    "expires": ("Expires", "过期时间"),
    "never": ("never", "永不"),
    "public": ("public", "公开"),
    "actions": ("Actions", "操作"),
    "publish": ("Publish", "公开"),
    "publish_and_push": ("Publish and push to ModelScope", "公开并推送到魔搭"),
    "publish_hint": ("Everybody on this server may load it.", "本服务器的所有用户均可加载。"),
    "unpublish": ("Make private", "设为私有"),
    "delete": ("Delete", "删除"),
    "delete_for_ever": ("Yes, delete for ever", "确认永久删除"),
    "download": ("Download", "下载"),
    "keep": ("Keep", "保留"),
    "keep_for": ("Keep for", "保留时长"),
    "for_ever": ("for ever", "永久"),
    "one_day": ("one day", "一天"),
    "one_week": ("one week", "一周"),
    "one_month": ("30 days", "30 天"),
    "try_it": ("Chat", "对话"),
    "done_published": ("Published.", "已公开。"),
    "done_unpublished": ("Made private.", "已设为私有。"),
    "done_deleted": ("Deleted.", "已删除。"),
    "done_kept": ("Lifetime set.", "保留时长已设置。"),
    "playground_hint": (
        "One question, two answers: the base model on the left, your checkpoint on the right.",
        "同一问题，两个回答：左为基础模型，右为您的检查点。",
    ),
    "checkpoint": ("Checkpoint", "检查点"),
    "none": ("none", "无"),
    "system_prompt": ("System prompt", "系统提示"),
    "message": ("Message", "消息"),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "clear": ("Clear", "清空"),
    "temperature": ("Temperature", "温度"),
    "max_tokens": ("Longest answer, tokens", "最长回答（词元）"),
    "you": ("You", "您"),
    "playground_script": ("The playground needs JavaScript.", "对话试用需要启用 JavaScript。"),
    "operators_only": ("This page is for the operators of the service.", "此页面仅供服务运维人员使用。"),
    "healthy": ("healthy", "正常"),
    "recovering": ("recovering", "恢复中"),
    "slots": ("Adapter slots", "适配器槽位"),
    "free": ("free", "空闲"),
    "slot_of": ("slot {slot}: tenant {tenant}", "槽位 {slot}：租户 {tenant}"),
    "shares": ("Tokens by tenant", "各租户词元占比"),
    "tenant": ("Tenant", "租户"),
    "share": ("Share", "占比"),
    "no_work": ("No work yet.", "暂无工作。"),
    "ticks": ("Ticks", "节拍数"),
    "recoveries": ("Recoveries", "恢复次数"),
    "no_recoveries": ("none since the start", "启动以来无"),
    "measures": ("Measures", "指标"),
    "measure": ("Measure", "指标"),
    "value": ("Value", "数值"),
    "measure_resident_adapters": ("runs in a slot", "槽位中的任务"),
    "measure_paged_adapters": ("runs kept outside the slots", "已换出的任务"),
    "measure_requests_in_flight": ("requests with the workers", "处理中的请求"),
    "measure_runs_waiting": ("runs that wait for a tick", "排队的任务"),
    "measure_samples_waiting": ("samples that wait", "排队的采样"),
    "measure_paged_host_bytes": ("paged runs in memory", "换出任务占用内存"),
    "measure_paged_disk_bytes": ("paged runs on disk", "换出任务占用磁盘"),
    "measure_snapshot_host_bytes": ("sampling snapshots in memory", "采样快照占用内存"),
    "measure_kv_blocks_free": ("free blocks of KV cache", "空闲 KV 缓存块"),
    "measure_kv_blocks": ("blocks of KV cache", "KV 缓存块总数"),
    "sessions": ("Sessions", "会话"),
    "pending": ("Requests pending", "未完成请求"),
    "kept": ("Results kept", "已保留结果"),
    "journal_lag": ("Journal lag", "日志延迟"),
    "journal_bytes": ("Journal size", "日志大小"),
    "journal_stalled": ("The journal cannot be written: {reason}", "日志无法写入：{reason}"),
    "tagline": (
        "A LoRA training service: your program trains an adapter of your own on a model that many share.",
        "LoRA 训练服务：多人共享同一基础模型，您的程序训练属于自己的适配器。",
    ),
    "connect": ("How to connect", "如何连接"),
    "models": ("Models", "模型"),
    "models_loading": ("The models are being loaded.", "模型加载中。"),
    "context": ("context {tokens} tokens", "上下文 {tokens} 词元"),
    "up_to_rank": ("LoRA rank up to {rank}", "LoRA 秩最大 {rank}"),
    "open_console": ("Open the console", "打开控制台"),
    "api_page": ("API description", "API 描述"),
    "openai_hint": (
        "Any OpenAI client works, too: its base_url is {url}",
        "也可使用任意 OpenAI 客户端，base_url 为 {url}",
    ),
    "your_key": ("your key", "您的密钥"),
}


def translator(language: str) -> Callable[..., str]:
    """A function from a key (and what to fill in) to words. A key that is not in the table is a bug."""
    column = list(LANGUAGES).index(language)

    def translate(key: str, **values: object) -> str:
        return TEXTS[key][column].format(**values)

    return translate


def choose_language(asked: str | None, accepted: str | None) -> str:
    """asked: what the visitor chose before, if anything. accepted: the browser's Accept-Language."""
    if asked in LANGUAGES:
        return str(asked)
    for part in (accepted or "").split(","):
        language = part.partition(";")[0].strip().lower()[:2]
        if language in LANGUAGES:
            return language
    return "en"
