#!lua flags=allow-oom
-- Takes the jobs of workers whose lease has ended. Every gateway and idle worker runs it each second.
-- ARGV  1 lease ms  2 most workers  3 most jobs of each  4 most fruitless attempts  5 most claims
-- Reply {requeued ids, dead-lettered ids}
--@include base
--@include jobs
local now, lease = now_ms(), tonumber(ARGV[1])
local requeued, dead = {}, {}
local ended = ended_by('reaped', 'grace', now, lease)
shorten_leases(P .. 'wl', now, lease, ARGV[2])
for _, wid in ipairs(call('ZRANGEBYSCORE', P .. 'wl', '-inf', int(ended), 'LIMIT', 0, ARGV[2])) do -- mutant: lease
  for _, id in ipairs(call('HRANDFIELD', P .. 'w:' .. wid, ARGV[3])) do
    local j = load(id)
    if not j or j.st ~= 'R' or j.w ~= wid then
      call('HDEL', P .. 'w:' .. wid, id) -- its hash was deleted by hand
    elseif requeue(j, true, tonumber(ARGV[4]), tonumber(ARGV[5]), now) then
      requeued[#requeued + 1] = id
    else
      dead[#dead + 1] = id
    end
  end
  if call('EXISTS', P .. 'w:' .. wid) == 0 then
    call('ZREM', P .. 'wl', wid)
    call('DEL', P .. 'wi:' .. wid, P .. 'wi:' .. wid .. ':at', P .. 'wc:' .. wid)
  end
end
return { requeued, dead }
