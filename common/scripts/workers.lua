#!lua flags=allow-oom
-- The workers of a shard.
-- ARGV  1 most workers
-- Reply {{worker, ms of lease left, jobs held, info or '', time of the last heartbeat ms or 0, who asked it to drain or ''}
-- ...}
--@include base
local now, found = now_ms(), {}
local leases = call('ZREVRANGE', P .. 'wl', 0, ARGV[1] - 1, 'WITHSCORES')
for at = 1, #leases, 2 do
  local wid = leases[at]
  local key = P .. 'wi:' .. wid
  local info, beat, drain = call('GET', key), call('GET', key .. ':at'), call('GET', key .. ':drain')
  found[#found + 1] = {
    wid, leases[at + 1] - now, call('HLEN', P .. 'w:' .. wid), info or '', tonumber(beat or 0), drain or '',
  }
end
return found
