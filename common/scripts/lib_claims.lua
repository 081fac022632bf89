local function body_of(j)
  if j.b == nil then j.b = call('HGET', P .. 'j:' .. j.id, 'b') end
  return j.b
end

-- A claimed job as the library reads it (ClaimedJob): id, epoch, n, chain hash, ms to the deadline, class, attempts,
-- tenant, prompt, cached and completion tokens, log bytes, progress, body, log entries, weight, times preempted, whether it
-- was handed out by its class's share, ms since it was accepted, times claimed.
local function pack_claim(j, now)
  local log = {}
  if j.n > 0 then log = call('XRANGE', P .. 'j:' .. j.id .. ':log', '-', '+') end
  return {
    j.id, j.ep, j.n, j.hash or last_hash(j.id), j.dl - now, j.c, j.at, j.t, j.pt, j.cp, j.ct, j.lb, j.progress,
    body_of(j), log, string.format('%.17g', j.wt), j.pe, j.fl,
    math.max(0, now - j.cr), j.nc,
  }
end

local function claim_bytes(j)
  return j.lb + #(body_of(j) or '')
end

-- KV slots to begin with what it has emitted. Never more than it needs to end: outputs may run one after another.
local function slots(j)
  return math.min(j.kv + j.ct, j.pk)
end
