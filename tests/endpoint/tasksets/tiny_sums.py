"""A taskset of verifiers with a harness of its own, which asks until a number is right, or three times."""

import openai
import verifiers.v1 as vf

__all__ = ["SumsHarness", "SumsTaskset"]


class SumsData(vf.TaskData):
    answer: str


class SumsTask(vf.Task[SumsData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=2.0)
    async def is_right(self, trace):
        return float(trace.branches[-1].messages[-1].content == self.data.answer)

    @vf.reward
    async def num_turns(self, trace):
        return float(trace.num_turns) / 10


class SumsConfig(vf.TasksetConfig):
    num_tasks: int = 4


class SumsTaskset(vf.Taskset[SumsTask, SumsConfig]):
    def load(self):
        for i in range(self.config.num_tasks):
            yield SumsTask(SumsData(prompt=f"{i} and {i}", answer=str(2 * i)), self.config.task)


class SumsHarness(vf.Harness[vf.HarnessConfig]):
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        messages = [{"role": "user", "content": data.prompt}]
        async with openai.AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0) as client:
            for _ in range(3):
                answer = await client.chat.completions.create(model=ctx.model, messages=messages)
                text = answer.choices[0].message.content
                if text == data.answer:
                    break
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "No."}]
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")
