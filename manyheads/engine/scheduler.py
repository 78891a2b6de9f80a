"""Who runs in the next step, and with which tree. Touches no tensors."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from manyheads.engine.admission import Admission
from manyheads.engine.fair_queue import STRANGER, FairQueue, by_seniority, divide
from manyheads.engine.page_manager import PageManager
from manyheads.engine.step import Chunk, Request, StepPlan
from manyheads.engine.step_target import StepTarget
from manyheads.errors import QueueFull
from manyheads.speculation.draft import NO_DRAFT, Draft


class StepsUnread(Exception):
    """What was launched must be read first: pages ran out."""


class Scheduler:
    """Owns the requests: decoding rows always run, prompts in chunks beside them; who starts next, `FairQueue` says.

    `running` is in the order of who keeps what it has: by priority, then the first row of each client, then the second
    of each, those that came first before the others. So the last of it is the youngest row of the client with most.

    When pages run out, trees shrink first, then the last of `running` is preempted: it gives its pages back, keeps its
    text, and goes to the front of its client's line. It also makes room for a request whose client is behind its own,
    as long as its own has twice as many rows as that client will have. So the first of `running` always gets on, nobody
    of its priority ever comes before it, and every request ends.

    Args:
        target: how long a step may be; its planner chooses the trees.
        max_num_seqs: most rows at once.
        max_model_len: tokens of the longest text that the device has room for.
        max_queue: most waiting requests.
        admission: says who would not start in time; None lets everyone wait.
    """

    def __init__(
        self,
        pages: PageManager,
        target: StepTarget,
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_queue: int,
        admission: Admission | None = None,
    ) -> None:
        self.pages = pages
        self.max_model_len = max_model_len
        self.target, self.planner = target, target.planner
        self.max_queue = max_queue
        self.admission = admission or Admission()
        self.waiting = FairQueue()
        self.running: list[Request] = []
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._num_admissions = 0
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            QueueFull: nothing was queued. One that an engine accepted before it died is not refused.
        """
        if not request.has_started and not request.resumes:
            wait, num_waiting = self.expected_wait(request.client, request.priority), len(self.waiting)
            if num_waiting >= self.max_queue:
                message = f"{num_waiting} requests are waiting; the limit is {self.max_queue}"
                raise QueueFull(message, wait / num_waiting)
            request.start_by = self.admission.deadline(wait, request.timeout)
        self.waiting.add(request)

    def expected_wait(self, client: str = STRANGER, priority: int = 0) -> float:
        """How many seconds a request would wait that a client sent now; 0 while that cannot be told."""
        return self.admission.expected_wait(self.waiting, self.running, self._num_free_rows, client, priority)

    def expired(self) -> list[Request]:
        """Those who did not start in time, all the same; they are to be removed."""
        return self.waiting.late(self.admission.clock())

    def refusal(self, request: Request) -> QueueFull:
        """What to tell someone who did not start in time."""
        return self.admission.refusal(self.expected_wait(request.client, request.priority), request.timeout)

    def remove(self, request: Request) -> None:
        """Forget a finished or aborted request and take its pages and its row back."""
        if request.has_started:
            self.waiting.output_share.learn(request.num_output, request.max_len - request.prompt_len)
        if request.held_row is None:
            self.waiting.remove(request)
            return
        self.running.remove(request)
        self._release(request)
        self.running = by_seniority(self.running)

    def charge(self, request: Request, num_tokens: int) -> None:
        """Count the output that a request gained as its client's."""
        self.admission.count(self.waiting.charge(request, 0, num_tokens))

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when nobody can run.

        Raises:
            StepsUnread: call again when nothing is unread.
        """
        for request in self.running:
            self.pages.drop(request.table, request.cached_len)
        rows = [request for request in self.running if request.decoding]
        self.planner.rows_are([r.adapter for r in rows], sum(self.pages.num_seen(r.cached_len) for r in rows))
        num_decoding = len(rows)
        has_prompts = self.waiting or num_decoding < len(self.running)  # most steps have none
        budget = self.target.most_prompt_tokens(num_decoding) if has_prompts else 0
        kept_pages = self._make_room(budget)
        decoding = [request for request in self.running if request.decoding]
        starting = self._next()
        prompts = self._divide(len(decoding), budget, starting)
        drafts = any(request.params.speculative for request in (*self.running, *starting))
        draft = self.planner.choose(max(len(decoding), 1), sum(prompts.values())) if drafts else NO_DRAFT
        while (
            draft.propose
            and self._missing_pages(draft, self.running or starting[:1]) > self.pages.num_available - kept_pages
        ):
            draft = self.planner.smaller(draft)
        plan = StepPlan(chunks=[], decoding=[], draft=draft)
        preemptions = self.num_preemptions
        for request in list(self.running):
            if request.held_row is None:
                continue  # preempted for one before it in this very loop
            if request.decoding:
                self._plan_decoding(plan, request)
            elif prompts[request] > 0:
                self._plan_chunk(plan, request, prompts[request])
        if self.num_preemptions == preemptions:
            self._admit(plan, starting, prompts)
        self.admission.tick(self.waiting.has_ready)
        if not (plan.chunks or plan.decoding):
            return None
        plan.decoding.extend(request for request in decoding if self._may_come_along(plan, request))
        plan.companions.extend(self.pages.news())
        return plan

    def _divide(self, num_decoding: int, budget: int, starting: list[Request]) -> dict[Request, int]:
        """How many tokens of each prompt a step computes: of those that have begun, and of those that are to start."""
        prompts = {request: request.num_uncomputed for request in self.running if not request.decoding}
        wanted = sum(prompts.values())
        for request in starting:
            # what the prefix cache has is not computed; how much that is only matters while the budget lasts
            known = self.pages.num_known(request.table, request.tokens) if wanted < budget else 0
            prompts[request] = len(request.tokens) - known
            wanted += prompts[request]
        total = self.target.prompt_tokens(num_decoding, wanted) if prompts else 0
        given = divide([(request.client, tokens) for request, tokens in prompts.items()], total)
        return dict(zip(prompts, given, strict=True))

    def _make_room(self, budget: int) -> int:
        """Preempt rows of clients that have more than their share, for requests that are to start in this step.

        Args:
            budget: so many prompt tokens may be computed beside those who decode.

        Returns:
            How many pages are to be left to those requests; 0 if nobody was preempted for them.
        """
        if not (self.waiting and self.running):
            return 0
        levels = self.waiting.levels(self.running)
        rows = Counter(request.client for request in self.running)
        starting = Counter[str]()
        pages = 0
        preemptions = self.num_preemptions
        for request in self.waiting.in_turn(levels):
            client, num_tokens = request.client, min(len(request.tokens), budget)
            if num_tokens == 0:
                break  # it would get none in this step
            if self.pages.pages_for(num_tokens) > self.pages.num_usable - 2:
                break  # there is no room for it beside a single row, and one stays
            starting[client] += 1
            pages += self.pages.pages_for(num_tokens + self.planner.scratch) + 1
            while starting.total() > self._num_free_rows or pages > self.pages.num_available - len(self.running):
                last = self.running[-1]
                without = levels[last.client] - self.waiting.expected(0, last.room)
                # a row that is taken computes some of its text again; near the shares, those that come free will do
                is_owed = rows[last.client] >= 2 * (rows[client] + starting[client]) and levels[client] < without
                if not is_owed or last.priority < request.priority:
                    return pages if self.num_preemptions > preemptions else 0
                if self._has_unread:
                    raise StepsUnread
                self._preempt(last)
                rows[last.client] -= 1
                levels[last.client] = without
            levels[client] += self.waiting.expected(request.unpaid, request.room)
            budget -= num_tokens
        return pages if self.num_preemptions > preemptions else 0

    def _missing_pages(self, draft: Draft, requests: list[Request]) -> int:
        """Pages to be taken if each that decodes brought such a tree, beside the chunks of the others."""
        chunk = self.target.max_num_batched_tokens
        wanted = ((r, r.max_cached_len + r.most_slots(draft, chunk)) for r in requests)
        return sum(max(0, self.pages.pages_for(length) - len(r.table.pages)) for r, length in wanted)

    def _plan_decoding(self, plan: StepPlan, request: Request) -> None:
        if request.room <= request.unread:
            return  # what is unread may be all that it gets
        if self._reserve_or_preempt(request, request.max_cached_len + plan.draft.num_slots):
            plan.decoding.append(request)

    def _may_come_along(self, plan: StepPlan, request: Request) -> bool:
        """Whether a row that may have all its tokens runs in a step that others run in anyway.

        It does if it can have more to come, since an unread step brings one token at least, and takes nothing from
        others; and not where its text may be as long as the device has room for.
        """
        return (
            request.held_row is not None
            and 1 < request.room <= request.unread
            and len(request.tokens) + request.unread < self.max_model_len
            and self.pages.reserve(request.table, request.max_cached_len + plan.draft.num_slots)
        )

    def _plan_chunk(self, plan: StepPlan, request: Request, num_tokens: int) -> None:
        num_tokens = self._fitting(request, plan.draft, num_tokens)
        if not self._reserve_or_preempt(
            request, request.cached_len + num_tokens + request.scratch(plan.draft, num_tokens)
        ):
            return
        plan.chunks.append(Chunk(request, num_tokens, num_tokens == request.num_uncomputed))

    def _fitting(self, request: Request, draft: Draft, num_tokens: int) -> int:
        """How many of the next tokens of its text there are pages for now; 1 if there are none."""
        scratch = request.scratch(draft, num_tokens)
        room = (len(request.table.pages) + self.pages.num_available) * self.pages.page_size - request.cached_len
        return num_tokens if num_tokens + scratch <= room else max(1, min(num_tokens - (scratch > 0), room))

    def _reserve_or_preempt(self, request: Request, num_tokens: int) -> bool:
        """Reserve, at the cost of those after it; False if the request itself had to give way."""
        if self.pages.reserve(request.table, num_tokens):
            return True
        if self._has_unread:
            raise StepsUnread
        # first, what trees reserved and did not use; the rows before it are in the plan already and need all they hold
        for other in self.running[self.running.index(request) :]:
            self.pages.trim(other.table, other.cached_len + 1)
        while not self.pages.reserve(request.table, num_tokens):
            last = self.running[-1]
            self._preempt(last)
            if last is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.cached_len = 0
        request.has_candidates = False
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.put_back(request)

    def _release(self, request: Request) -> None:
        self.pages.free(request.table)
        self._free_rows.append(request.row)
        request.held_row = None

    def _admit(self, plan: StepPlan, starting: list[Request], prompts: dict[Request, int]) -> None:
        for request in starting:
            if prompts[request] == 0:
                continue
            request.cached_len = self.pages.share_prefix(request.table, request.tokens)
            num_tokens = min(request.num_uncomputed, prompts[request])
            if not self.running:
                # what is computed at once has companions, and may take more pages than the whole text needs
                num_tokens = self._fitting(request, plan.draft, num_tokens)
            # leave a page for each running row, or it would be preempted in the next step already
            spare = self.pages.num_available - len(self.running)
            length = request.cached_len + num_tokens + request.scratch(plan.draft, num_tokens)
            wanted = self.pages.pages_for(length) - len(request.table.pages)
            if wanted > spare or not self.pages.reserve(request.table, length):
                self.pages.free(request.table)
                request.cached_len = 0
                break
            self._start(request)
            plan.admitted.append(request)
            plan.chunks.append(Chunk(request, num_tokens, num_tokens == request.num_uncomputed))
        self.running = by_seniority(self.running)

    def _next(self) -> list[Request]:
        """Who is to start, in turn, as far as rows are free."""
        if not (self.waiting and self._num_free_rows):
            return []
        return list(islice(self.waiting.in_turn(self.waiting.levels(self.running)), self._num_free_rows))

    @property
    def _has_unread(self) -> bool:
        """Whether steps that were launched may still bring rows something, or tell the prefix cache of their pages."""
        return any(request.unread or request.unread_known for request in self.running)

    @property
    def _num_free_rows(self) -> int:
        """How many rows may start, so that steps do not become too long."""
        most = len(self.running) + len(self._free_rows)
        return max(0, self.target.most_rows(most) - len(self.running))

    def _start(self, request: Request) -> None:
        self.waiting.remove(request)
        if not request.has_started:
            request.num_cached_prompt_tokens = min(request.cached_len, request.prompt_len)
            self.prefix_queries += request.prompt_len
            self.prefix_hits += request.cached_len
            self.waiting.prompt_share.learn(request.prompt_len - request.cached_len, request.prompt_len)
            self.admission.count(self.waiting.charge(request, request.prompt_len - request.cached_len, 0))
        self._num_admissions += 1
        request.admission = self._num_admissions
        request.held_row = self._free_rows.pop()
        self.running.append(request)

    def check_integrity(self) -> None:
        """Every page, row and request is in exactly one place.

        Raises:
            RuntimeError: saying what is wrong.
        """
        self.pages.check_integrity([request.table for request in self.running])
        rows = [request.held_row for request in self.running]
        if None in rows or len(set(rows)) != len(rows) or set(rows) & set(self._free_rows):
            raise RuntimeError(f"rows {rows} of running requests and free rows {self._free_rows} overlap")
        for request in self.waiting:
            if request.held_row is not None or request.table.pages or request.cached_len:
                raise RuntimeError(f"waiting request {request.request_id} holds a row or pages")
        for request in self.running:
            last = len(request.tokens) - (request.unread == 0)
            if not 0 <= request.cached_len <= last < request.max_len + (request.unread > 0):
                raise RuntimeError(f"request {request.request_id}: lengths out of order")
            if len(request.table.pages) * self.pages.page_size < request.cached_len:
                raise RuntimeError(f"request {request.request_id}: fewer pages than cached tokens")
