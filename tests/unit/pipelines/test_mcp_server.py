# SPDX-License-Identifier: Apache-2.0
"""The MCP server, with the mcp package's own client: in memory, over stdio, and over HTTP on this machine."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from paths import ROOT
from scripted_tools import open_toolbox, picture

pytest.importorskip("mcp")
import anyio
from mcp import Client, StdioServerParameters

from lionjax.pipelines.tools import mcp_server


@pytest.fixture
def toolbox(tmp_path):
    found = open_toolbox(tmp_path / "work", detector=True)
    found.workspace.add(picture())
    return found


def with_client(target, use):
    """What `use(client)` returns."""

    async def run():
        async with Client(target) as client:
            return await use(client)

    return anyio.run(run)


def test_the_same_definitions_are_offered_with_the_same_schemas(toolbox):
    async def use(client):
        return (await client.list_tools()).tools

    listed = {tool.name: tool for tool in with_client(mcp_server.build_server(toolbox), use)}
    assert set(listed) == {tool.name for tool in toolbox.tools} | {"show"}
    for tool in toolbox.tools:
        theirs, ours = listed[tool.name].input_schema, tool.parameters
        assert set(theirs["properties"]) == set(ours["properties"])
        assert theirs.get("required", []) == ours["required"] and theirs["additionalProperties"] is False
        for name, part in ours["properties"].items():
            assert {key: theirs["properties"][name][key] for key in part} == part
        assert tool.description in listed[tool.name].description and "Cost: " in listed[tool.name].description


def test_results_are_structured_errors_are_sentences_and_images_are_shown(toolbox, monkeypatch):
    name = toolbox.workspace.names()[0]

    async def use(client):
        calls = [
            ("detect", {"image": name, "words": "square"}),
            ("edges", {"image": name}),
            ("show", {"image": name}),
            ("crop", {"image": "../x.png", "box": [0, 0, 1, 1]}),
            ("crop", {"image": name, "box": "all"}),
            ("caption", {"image": name}),
            ("crop", {"image": name, "box": "[0, 0, 1, 1]"}),  # as JSON text, which some clients send
            ("crop", {"image": name, "box": [0, 0, 1, 1], "path": "/etc"}),
            ("show", {}),
            ("show", {"image": 5}),
        ]
        return [await client.call_tool(*call) for call in calls]

    def broken(*_, **__):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(toolbox.experts.model, "answer", broken)
    found, edges, shown, outside, wrong, failed, as_text, *wrongs = with_client(mcp_server.build_server(toolbox), use)
    assert found.structured_content["result"][0]["label"] == "square"
    assert toolbox.workspace.path(edges.structured_content["file"]).is_file()
    assert shown.content[0].type == "image" and shown.content[0].mime_type == "image/png"
    assert outside.is_error and "no file name of the work folder" in outside.content[0].text
    assert not as_text.is_error
    texts = [one.content[0].text for one in (wrong, *wrongs) if one.is_error]
    assert [text.removeprefix("Error executing tool ") for text in texts] == [
        "crop: box is 'all'; give a list of at most 64",
        "crop: crop has no argument 'path'; it takes image, box",
        "show: show needs the argument image",
        "show: image is a int; give a string",
    ]
    assert failed.is_error and "unexpected RuntimeError" in failed.content[0].text
    assert "secret detail" not in failed.content[0].text


def command(folder, *options):
    picture().save(folder / "scene.png")
    arguments = ["tools", "--mcp", "--workdir", str(folder / "work"), "--image", str(folder / "scene.png"), *options]
    return [sys.executable, "-m", "lionjax.cli", *arguments]


def environment():
    return dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, sys.path)]), JAX_PLATFORMS="cpu")


async def crop_first(client):
    listed = await client.call_tool("images", {})
    (image,) = listed.structured_content["result"]
    cropped = await client.call_tool("crop", {"image": image["file"], "box": [0, 0, 0.5, 1]})
    return cropped.structured_content["file"]


@pytest.mark.slow
def test_a_client_uses_the_command_over_stdio(tmp_path):
    program, *arguments = command(tmp_path)
    server = StdioServerParameters(command=program, args=arguments, env=environment(), cwd=str(tmp_path))
    assert (tmp_path / "work" / with_client(server, crop_first)).is_file()


@pytest.mark.slow
def test_a_client_uses_the_command_over_http_on_the_loopback_address(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(command(tmp_path, "--port", str(port)), env=environment(), stderr=subprocess.PIPE)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, server.stderr.read().decode()
            time.sleep(0.1)
        assert (tmp_path / "work" / with_client(f"http://127.0.0.1:{port}/mcp", crop_first)).is_file()
    finally:
        server.terminate()
        server.wait(20)
        server.stderr.close()


def test_the_tools_are_listed_for_openai_too(toolbox):
    schemas = json.dumps([tool.openai_schema for tool in toolbox.tools])
    assert json.loads(schemas)[0]["type"] == "function"
